"""Sentences that a target is put into: short, clinical, casual, formal, order-form ones. The longer voices are in `voices`.

One template a line. {t}: the target with its article, {n}: without; {m}: "CT", "MRI" or "scan"; {age}, {day}, {dr}, {num}: fillers.
Every family has its own lines for train, val and test language; no line is in two of them.
"""

from __future__ import annotations

TERSE = {
    "train": """
{n}
{n} pls
{n} please
seg {n}
{n} seg
{n} mask
mask {n}
{n} contour
contour {n}
outline {n}
{n} outline pls
{n} only
just {n}
{n} vol
vol {n}
{n} volume
{n}, thx
need {n}
get {n}
show {n}
mark {n}
{n} on this {m}
{m} {n}
{n} roi
ROI {n}
target {n}
target: {n}
{n} segmentation
segment {n}
{n}?
{n} visible?
find {n}
{n} today pls
{n} + volume
want {n}
draw {n}
{n} label
label {n}
pls {n}
{n} - seg
""",
    "val": """
{n} wanted
seg: {n}
{n} 3D
autoseg {n}
{n} mask pls
quick {n}
{n} borders
struct: {n}
just the {n}
{n} ASAP
""",
    "test": """
{n} pretty please
delin {n}
{n} delineation
3D of {n}
{n} in 3D
{n} for volumetry
voi {n}
VOI = {n}
trace {n}
{n} tracing
extract {n}
{n}, thank you
{n} asap pls
{n} = ?
where {n}
isolate {n}
{n} isolated
{n} surface
{n} alone
paint {n}
""",
}

CLINICAL = {
    "train": """
Please segment {t}.
Please outline {t} on this {m}.
Could you contour {t} for me?
Can you segment {t} so that we can measure it?
I need {t} outlined before the meeting.
Please mark {t} for the planning session.
Kindly contour {t} for volumetry.
We would like a mask of {t} for follow-up.
Please provide a segmentation of {t} for surgical planning.
Segment {t} for comparison with the prior study.
Outline {t}, we want to follow its size.
Could we have {t} contoured before the operation?
Please show me {t} on this {m}.
For the case discussion, please outline {t}.
Contour {t} please, the team wants a 3D model.
I would like {t} segmented for the volume report.
Please delineate {t} for dose planning.
We need the volume of {t}; please segment it.
Can I get an outline of {t} on all slices?
Please draw {t} on every slice where it is visible.
Mask {t} please, it is for the tumour board.
Segment {t} on the current {m}, please.
Need {t} outlined for the morning round.
Please find {t} and outline it.
For teaching, please mark {t} on this {m}.
Can you give me the contour of {t}?
Outline {t} for the surgeon, please.
Please prepare a mask of {t} for the consult at {num}.
Requesting segmentation of {t}, thank you.
Please highlight {t} so that I can show it to the patient.
Would you contour {t} in this study?
We are asked for the size of {t}; please outline it.
Please label {t} for the clinic on {day}.
Could you highlight {t} on this {m}?
Patient of {age} years, please outline {t}.
{age}-year-old, please segment {t}.
Before discharge we want {t} measured, please contour it.
Please send the contour of {t} to {dr}.
{dr} asks for {t} to be segmented.
Please add a contour of {t} to the study.
""",
    "val": """
May I ask for {t} to be outlined?
Could {t} be segmented before we meet the family?
Please map {t} on this study.
The team on the ward wants {t} measured.
Kindly mark out {t} for me.
I'd appreciate an outline of {t}.
Please mark {t} for the case conference on {day}.
For {dr}: contour of {t}, please.
Can we see {t} segmented for baseline measurement?
Please contour {t} ahead of the procedure.
""",
    "test": """
Would you be able to trace {t} for us?
Grateful for a delineation of {t}.
We'd be glad of a mask covering {t}.
Please isolate {t} for volumetric assessment.
Extraction of {t} for the preoperative conference, please.
Our registrar needs {t} delineated by {day}.
Please trace the borders of {t} slice by slice.
Can the boundary of {t} be drawn on this acquisition?
As discussed by phone, please extract {t}.
On {dr}'s behalf: could {t} be delineated?
Follow-up visit, {age} y: kindly trace {t}.
Seen in clinic today; we require {t} in 3D.
Please let us have {t} as a volume of interest.
To plan the next step we must see {t} delineated.
Baseline before therapy: trace {t}, please.
Grateful if {t} could be picked out on this {m}.
What we need from you is an accurate outline of {t}.
Please single out {t}; we are tracking its growth.
Urgent for theatre: delineate {t}.
The referring physician would like to have {t} traced.
""",
}

CASUAL = {
    "train": """
can you outline {t}
plz segment {t}
pls mark {t} thx
hey can u seg {t}
need {t} outlined pls
show me {t} pls
just {t} thanks
can u mark {t} for me
please outline {t} asap
segment {t} when you get a chance
i need {t}
gimme {t}
want {t} on this {m}
could you do {t} pls
outline {t} pls, its for the board
mask for {t} please
do {t} first pls
where is {t}, please mark it
{t} please, need the volume
contour {t} thx
hi, contour {t} pls
pls find {t} and draw it
quick one: {t}
segmentation of {t} pls
{n} please and thank you
{n} mask when ready
plz get {t}
ok now {t}
same scan, {t} pls
need vol of {t}
mark out {t}
i want to see {t}
draw {t} for me pls
{t} on this one pls
can you label {t}
please just {t}
thx for doing {t}
do a mask of {t}
outline of {t} needed
let me have {t}
""",
    "val": """
u free? need {t} marked
could u grab {t} for me
seg of {t} plz
be nice and outline {t}
only {t} for this one
{t} again pls
put a contour on {t}
next up {t}
still need {t}
would love {t} outlined
""",
    "test": """
trace {t} would ya
yo delineate {t}
any chance of {t} today
gonna need {t} traced
{t} if you dont mind
cheers, {t} please
pull out {t} for us
mind tracing {t}
{t} next thanks a lot
sry one more: {t}
can we get {t} real quick
drop me {t}
im after {t}
whats the extent of {t}, trace pls
lasso {t} pls
{t} asap, boss is waiting
isolate {t} if u can
ty for tracing {t}
knock out {t} pls
colour in {t} pls
""",
}

FORMAL = {
    "train": """
Task: segment {t}.
Segment the following structure: {n}.
Structure of interest: {n}. Output: binary mask.
Produce a voxel-wise segmentation of {t}.
Generate a binary mask of {t}.
Task: delineate {t} in the given {m} volume.
Target structure: {n}. Please return a mask.
Perform 3D segmentation of {t}.
Segmentation target: {n}.
Objective: obtain the mask of {t}.
Given this {m}, segment {t}.
Given the volume, return all voxels of {t}.
Input: {m}. Output: mask of {t}.
Label all voxels belonging to {t}.
Identify and segment {t} in this study.
Compute the segmentation mask for {t}.
The structure to be segmented is {t}.
Delineate the structure: {n}.
Return the mask for the class: {n}.
Class to segment: {n}.
Protocol step {num}: segmentation of {t}.
Study protocol: contour {t} on all slices.
Please perform volumetric segmentation of {t}.
Required: a 3D mask of {t}.
Instruction: outline {t} in the whole volume.
Automatic segmentation of {t} is requested.
Segment {t} for volumetric analysis.
Item {num}: mask of {t}.
The task is to mark {t} in three dimensions.
Target: {n}. Format: NIfTI mask.
Annotate {t} in this {m} volume.
Annotation task: {n}.
Find the voxels of {t} and label them 1.
Create a label map of {t}.
Assign label 1 to {t} and 0 elsewhere.
Segmentation of {t} according to the study protocol.
Please annotate: {n}.
For this volume, output the mask of {t}.
Determine the boundary of {t}.
Foreground: {n}. Background: everything else.
""",
    "val": """
Assignment: mask {t} in three dimensions.
Query: {n}. Expected result: segmentation.
Provide the label map for {t}.
Endpoint {num} of the protocol requires {t} to be segmented.
Measure {t} by volumetric segmentation.
Region of interest: {n}. Deliver as mask.
Mask generation for {t} is required.
Please execute the segmentation of {t}.
Annotation request no. {num}: {n}.
Only {t} shall be labelled.
""",
    "test": """
Requirement: isolate {t} as a three-dimensional object.
Objective of this run: extraction of {t}.
According to section {num} of the trial manual, {t} must be traced.
VOI definition: {n}.
Derive a volume of interest comprising {t}.
Extract {t} from the supplied volume.
All voxels of {t} are to be set to one.
Deliverable: voxel mask, structure: {n}.
Anatomical target for extraction: {n}.
It is requested that {t} be delineated throughout the volume.
Reader instruction {num}: trace {t} on consecutive slices.
The entity to be extracted from this {m} is {t}.
Trial endpoint: volume of {t}; delineate accordingly.
Specify the extent of {t} by means of a mask.
Dataset annotation, current object: {n}.
Work item: {n} (3D delineation).
Please carry out the delineation of {t} as specified.
Use this {m} to extract {t}.
Provide the spatial extent of {t}.
Object of measurement: {n}.
""",
}

ORDER = {
    "train": """
ORDER: segmentation. STRUCTURE: {n}. PRIORITY: routine.
Exam: {m}. Request: contour of {t}. Indication: volumetry.
Request: {n} segmentation | Priority: urgent
Service: 3D lab. Structure: {n}. Purpose: planning.
Order no. {num}: outline {t}.
[x] segmentation  structure: {n}
Indication: follow-up. Please contour: {n}.
Requested by: {dr}. Structure: {n}.
Task: contouring / Structure: {n} / Due: {day}
Reason for exam: pre-op planning. Contour {t}.
Order entry: {n}, contour, all slices.
Modality: {m}. Target: {n}. Output: mask + volume.
REQUEST {n} CONTOUR, ROUTINE
Study: {m}. To be segmented: {n}.
Planning order: contour {t}, due {day}.
Structure requested: {n}. Comment: for volumetry.
Postprocessing order: {n}, 3D volume.
Referral: {dr}. Please segment {t}.
Age {age}. Exam {m}. Segment: {n}.
Worklist item {num}: {n}
3D lab request: mask of {t}.
Structure list: {n}
Contours needed: {n}.
OAR/target list, item {num}: {n}.
Order comment: please outline {t}.
Add-on request: segment {t} on existing {m}.
Ward request: contour of {t} for the record.
Priority: high. Needed: {n}.
Measurement order: volume of {t}.
Clinical question: size of {t}. Please segment.
Question: volume of {t}?
Type: segmentation; object: {n}; slices: all
Urgent: contour {t}. Requested by {dr}.
Form field 'structure': {n}
Order: {n}, segmentation, no report needed.
Requesting unit: surgery. Structure: {n}.
Postproc: {n} mask, export to planning system.
Planning {m}: contour {t}.
Please book: segmentation of {t}, {day}.
Reason: growth check. Contour: {n}.
""",
    "val": """
Form A / structure = {n} / return mask
To: imaging lab. Re: contour of {t}. When: {day}.
Job {num}, structure {n}, urgency normal.
Requisition: {n}, three-dimensional mask.
Study {m}, add segmentation {n}.
Segmentation slip: {n}. Signed {dr}.
Consult request: please mark {t}.
Box ticked: volumetry. Structure: {n}.
Structure code text: {n}. Priority: standard.
Booking note: {n} to be outlined on {day}.
""",
    "test": """
REQ#{num} // VOI: {n} // STAT
Ticket {num}: delineate {t} (urgency: soon).
Procedure: quantitative analysis. Object: {n}. Sender: {dr}.
E-referral, free text: trace {t}, send volume.
Imaging service request - object to trace: {n}
Subject: delineation. Body text: {n}.
Item: {n}; Qty: 1 mask; Deadline: {day}
Pt {age} y, {m} done, trace {n}, results to {dr}.
Field 7 (object): {n}. Field 8 (method): manual-quality tracing.
Trial worksheet, row {num}: {n}.
Task card: {n} -> trace -> export STL
Referral letter attached. Wanted: {n} as surface model.
Cc: {dr}. Please schedule delineation of {t}.
STAT: {n} needed in theatre.
Checklist: 1) open {m} 2) trace {t} 3) save
Request type = quantification, object = {n}
Print order (3D model): {n}
Volumetry sheet: {n}, date {day}.
Outpatient slip. Object wanted: {n}.
Navigation planning: object {n}, trace on thin slices.
""",
}

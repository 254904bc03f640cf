"""Longer voices: verbose letters, report sentences, chat between colleagues, dictation. The short ones are in `templates`.

One template a line, slots as there.
"""

from __future__ import annotations

VERBOSE = {
    "train": """
Good morning, thank you for helping us with this patient. We discussed the case at length, and to settle the question of growth we \
would be grateful if you could outline {t} on the attached {m}.
As you know the patient, aged {age}, has been followed for some years now. Nothing else has changed, but we would like to have {t} \
segmented so that the volume can be compared with the last visit.
Sorry for the late request on a {day}. The meeting was moved forward, and {dr} would like to see {t} outlined on the {m} before we start.
Hello, this is about the {m} that came in today. After some discussion with the family we decided on an operation, and for the planning \
it would help a lot if {t} could be contoured.
Dear colleague, the images are of good quality and were read yesterday. What is still missing for our records is a contour of {t}, \
which I ask you to provide.
We are putting together a small teaching series. Among the many things one could show on this {m}, please mark {t} for the students.
I know that the list is long today, so take your time. When you come to this study, please segment {t}; the volume goes into the letter.
The patient is {age} and asked us to explain the findings with pictures. To do so I would like to show {t}, so please outline it on \
every slice.
Thank you for the quick report. One more thing, if I may: the planning system needs a structure, and that structure is {t}. Could you \
contour it for us?
For the study that {dr} runs we need one measurement per visit. At this visit it is the volume of {t}, so please segment {t} on the {m}.
This is the second scan of this patient, the first one was done elsewhere. Since we want to compare the two, please outline {t} with \
care, down to the last slice.
I have looked at the study on my screen but cannot draw well with my mouse. Would you be so kind as to contour {t} for me?
Before we start treatment we would like a baseline. Please take the {m} from {day} and outline {t}, then send the mask to the usual place.
The registrar on call tells me that you can make masks automatically. If that is so, please make one of {t}; we would use it for the \
volume only.
Our physicist has asked for contours for the plan. Most of them are done, but {t} is still missing, so please add it.
Hi there, hope you had a good weekend. We have a patient of {age} years for the board on {day}, and everybody will ask about {t}, so \
please segment it.
It has been a while since we last measured anything here. To bring the chart up to date, please segment {t} and note the volume.
To whom it may concern: in the course of the current work-up it became clear that we need {t} outlined. Please do so on the {m} that we \
sent.
I was told to write a few lines so that nobody has to guess. The structure we need is {t}; everything else can be left as it is.
There were some questions from the family about size and position. So that we can answer them, please outline {t} on this {m}.
As agreed on the phone with {dr}, we send you the study once more. Please concentrate on {t} and give us a mask of it.
Given the long history of this patient and the many examinations already done, we only ask for one thing today: a contour of {t}.
The surgeon would like to turn the model on the screen during the operation. For that purpose, please segment {t} in three dimensions.
Please find attached the {m} of our patient, {age} years old, who is doing well. We would like to follow {t} over time and ask you for \
a first contour.
I am writing on behalf of {dr}, who is travelling. The request is simple: outline {t}, please, and let us know when it is done.
We had some trouble with the old software, so the earlier contours were lost. Could you please segment {t} again on the same {m}?
For quality control we repeat a few measurements each month. This month it is the turn of {t}, which I ask you to outline on this study.
The patient will come to the clinic on {day} and we would like to be prepared. Please have {t} contoured by then.
I do not need a full report, a picture would do. Please mark {t} so that the colleagues on the ward can see it.
Many thanks for taking this on at such short notice. What matters to us is {t}; please segment it as exactly as the slices allow.
After the last change of therapy we want to know whether anything has grown. The best way seems to measure {t}, so please outline it.
The images were acquired with our new protocol, so they may look a little different. Still, please contour {t} as you usually do.
If it is not too much trouble, could you help me with the volumetry for my thesis? For this case I need {t}.
This is for the planning of a procedure that is scheduled next week. Among the structures on the list, {t} is the one we still need, so \
please contour it.
We thought about doing this by hand, but it takes the better part of an hour. Please make a mask of {t} and we will check it.
In the interest of time I will be brief: the {m} is in the archive, the patient is {age}, and we would like {t} segmented.
The referring doctor is worried and would like some numbers. Please start with {t}: outline it and tell us how large it is.
Let me first say that the last mask you made was very helpful. For the next patient we would need the same for {t}.
Our board meets at {num} and the slides are almost ready. All that is missing is a picture with {t} outlined.
Thank you for your patience with all our requests this week. Today we would kindly ask you to segment {t} on the {m}.
""",
    "val": """
Following the visit of this {age}-year-old patient, and after going through the chart once more, we feel that a contour of {t} would \
help; please make one.
May I trouble you once more about the study from {day}? The one thing the team still asks for is {t}, marked on all slices.
This may be the last request before the holidays. We would be happy to have {t} outlined, since the volume belongs in the summary.
You will remember the patient from the meeting. In order to write the letter properly I would need a mask of {t} on the {m}.
Everyone here agrees that the eye is poor at judging size, so we would rather have {t} segmented and measured.
Our trainee is learning how to read these studies and would profit from seeing {t} marked on this one.
With thanks for your help in advance: please take the current {m} and mark {t}, the rest is of no interest today.
The insurance asks for a documented volume, so please be so good as to segment {t} and store the result.
I have tried twice with the old tool and gave up; perhaps you can outline {t} for us.
It would complete the record of this patient if {t} were contoured on the scan from {day}.
""",
    "test": """
Having reviewed everything that was sent with the patient, including letters from elsewhere, I come to the conclusion that what we lack \
is a proper delineation of {t}, for which I would be most obliged.
Apologies for the long message. In short, theatre is booked for {day}, the navigation system wants a surface, and so I need you to \
trace {t}.
Could I ask a favour? My consultant, {dr}, is presenting this {m} abroad, and a delineation of {t} would make the story much clearer.
The history is complicated and I will spare you the details; suffice it to say that the extent of {t} decides what we do next, so \
kindly delineate it.
Since the patient moved here only recently, there is nothing to compare with. We would therefore like to establish a reference by \
having {t} traced now.
We appreciate all the effort your group puts in. For this particular {age}-year-old person, could you please extract {t} and leave \
everything else aside?
Writing to you from the outpatient department, where the waiting room is full as ever. When time permits, a tracing of {t} would be \
wonderful.
In preparation for the interdisciplinary conference, and to avoid the usual debate about millimetres, please determine the exact extent \
of {t}.
Our engineers are printing a model for the surgical rehearsal. They can only print what has been delineated, and what they lack is {t}.
It was a pleasure to meet you at the course. As promised here is a study from our archive; would you extract {t} with your system?
There is some disagreement among us as to how big it really is, so we turn to you: please trace {t} from the first to the last slice.
Let me summarise: stable patient, good-quality {m}, no urgency at all. Wanted is the delineation of {t}, for the long-term record.
Although the report is final, the trial office has come back to us because worksheet {num} is empty. They need {t} traced.
I gather from {dr} that you have new software for this. It would be interesting to see how it copes with {t}; please try it on the \
enclosed {m}.
On reviewing the acquisition this morning it struck me that we never quantified {t}. Would you kindly extract it, so that a number can \
go into the discharge summary?
The physiotherapists, the surgeons and the patient all keep asking the same question, and to answer it properly someone has to \
delineate {t}.
Being new in this department I am unsure whom to ask, so forgive me if this is the wrong address: I am looking for somebody who can \
trace {t} on a {m}.
As part of an audit, {num} studies were drawn at random and this is one of them. The auditors wish to see {t} delineated.
Taking all of this into account, and in agreement with the patient, we have opted for watchful waiting; as a yardstick please extract {t}.
One last item before I sign off for the day: {t}, traced as neatly as you can manage on the {m} from {day}.
""",
}

REPORT = {
    "train": """
Findings: {n} to be segmented.
Comparison with prior. Please measure {t}.
Technique: {m}. Task: segmentation of {t}.
Impression: volumetry of {t} recommended.
Recommendation: contour {t} for follow-up.
Volumetry requested. Target: {n}.
Report addendum: contour of {t} needed.
Findings. {n}: please outline.
For the report: volume of {t}, please segment.
Addendum: segmentation of {t} requested by {dr}.
Planning note: {n} to be contoured on all slices.
Tumour board note: segmentation of {t} requested.
Indication: measurement of {t}. Segmentation to follow.
Technique adequate. {n} is to be outlined.
Quantitative analysis: {n}. Please provide mask.
Conclusion: please outline {t} to document its size.
Dictated note: contour {t}, then report the volume.
Structured report, item {num}: {n}, volume in mL.
Assessment of {t} requested, mask to be attached.
Study quality good. Outline of {t} requested.
Follow-up {m}. To be measured: {n}.
History: follow-up. Question: size of {t}. Please contour.
Progress note: awaiting contour of {t}.
Board decision: segment {t}, then discuss again.
Reading: {n} needs a contour for the record.
Pre-op note: please segment {t}.
Volume of {t} to be determined by segmentation.
Note for the 3D lab: outline {t}.
Request in report: delineate {t} on this {m}.
Comment: {n} should be outlined for comparison.
Plan: segmentation of {t} on the current study.
Plan: 1. contour {t}. 2. measure. 3. report.
Summary: contour of {t} outstanding.
To do: outline {t}, volume to be added to the report.
Radiology note, {day}: segment {t}.
Visit {num}: volume of {t} to be recorded.
Measurement: {n}, volume = to be computed from mask.
Quantification of {t} is requested for follow-up.
Note: {n} not yet contoured, please do.
Consult note: the team asks for a contour of {t}.
""",
    "val": """
Interval assessment: {n}, please mark.
Report line {num}: {n} (mask pending).
Supplement: a mask of {t} is to be attached.
Findings section: volume of {t} still open, please segment.
Note to file: {n}, contour due {day}.
Study reviewed with {dr}; contour of {t} advised.
Results: pending segmentation of {t}.
Baseline measurement of {t} to be made on this {m}.
Impression. See mask of {t} (to be created).
Case summary: outline of {t} will be added.
""",
    "test": """
Protocol: thin slices. Object for quantification: {n}.
Opinion: formal delineation of {t} would be helpful.
Description: see tracing of {t} (requested herewith).
Interpretation deferred until {t} has been traced.
Second reading by {dr}: extraction of {t} suggested.
MDT outcome, {day}: trace {t} and re-discuss.
Operative planning entry: VOI = {n}.
Observation {num}. {n}: extent to be delineated.
Clinic letter: we await the delineation of {t}.
Discharge summary, open point: tracing of {t}.
Quantitative section: {n} - extraction outstanding.
Radiotherapy chart: delineation of {t} prior to simulation.
Chart entry: kindly delineate {t}; extent matters for staging.
Imaging core lab query {num}: extent of {t}?
Advice: have {t} traced on the present acquisition.
Trial visit. Endpoint: {n}, extracted volume.
Ward round: still waiting for someone to trace {t}.
Verdict of the conference: delineate {t} first.
Evaluation of {t}: volumetric, by tracing.
Preliminary. Awaiting the extracted VOI of {t}.
""",
}

CHAT = {
    "train": """
hey, could you outline {t} on this one? thanks!
hi! quick favour, can you segment {t} for me?
morning :) need {t} contoured for the board
{dr} wants {t} outlined, can you do that?
are you free? need a mask of {t}
can you run the tool on {t} pls
lol my mouse died, can you contour {t} for me
ok so for this patient just {t} please
hi, me again. now {t} please
could you do {t} next? no rush
thanks for the last one! now {t} please
hey do you have a sec? {t} on the new {m}
just need {t}, the rest can wait
so for the talk on {day} i need a picture of {t}
can we get {t} as a mask? for the 3D print
pls pls can you outline {t}
got the {m}? cool, {t} then please
@you can you mark {t} pls
hey team, who can segment {t} today?
hi there, could someone contour {t}?
need the volume of {t} in the next hour, can you segment it?
ok thx. and {t} too pls
can you show me where {t} is? outline is fine
hi {dr} here, outline {t} please
sorry to bother, need {t} marked
ping: {t} for the case we talked about
fyi patient is {age}. please do {t}
could you have a go at {t}?
what about {t}? can you contour that
one more for today: {t} :)
ah and please {t} as well
student asked me to show {t}, can you mark it
hey, contour of {t} would be great
hiya, {t} on this {m} please
can u send me a mask of {t}
any idea how big it is? please segment {t}
pls do {t}, i check after lunch
i only need {t} this time
could you outline {t} for us? ty!
good evening, need {t} for tomorrow
""",
    "val": """
oi, mask of {t} when u can?
hey hey, think you could mark {t}?
new patient, same as always: {t} please
btw still missing {t}
:) could i have {t} outlined
dm me the mask of {t} please
if you are bored: {t} needs a contour
super quick one, {t}?
need your magic on {t}
helloo, {t} for the {day} clinic please
""",
    "test": """
heya, fancy tracing {t}?
sos, theatre in 20 min, need {t} delineated
you around? {t} would need extracting
tiny ask: trace {t} on that {m}
boss says {t}, so {t} it is
sup, who's on? {t} plz, navigation is waiting
wanna try {t} with the new model?
thumbs up if you can trace {t} today
aaand {t} is what i forgot
shout when {t} is traced :D
hmm what's the extent of {t}? trace it maybe
coffee on me if you extract {t}
last one i promise, {t}
gm! {t} traced by {day} possible?
slacking you bc phone is down: {t} pls
re: that {age} yo - extract {t}
could use a hand with {t}, tracing i mean
can't find the tracing of {t}, could you redo it
psst, {t}? asap
looking at this {m} with {dr}, she wants {t} highlighted
""",
}

SPEECH = {
    "train": """
okay please segment {t} full stop
um please outline {t} on this {m}
so for this patient please contour {t} thank you
next please mark {t} period
uh can you outline {t} please
new line segment {t} new line
dictation start please contour {t} dictation end
please um segment {t}
all right so we need {t} outlined please
the structure i need is {t} full stop
could you please outline uh {t}
for volumetry please segment {t} thank you
patient is {age} years old please outline {t}
i would like to have {t} contoured please
please draw {t} on all slices full stop
yes hello please mark {t} for me
and then please outline {t} okay
segment {t} comma please
this is {dr} please contour {t}
on the {m} please outline {t} full stop
for planning we need {t} contoured
okay computer segment {t}
can you find {t} and outline it please
outline please {t}
so um what i need is {t}
please show {t} thank you very much
for the board on {day} please outline {t}
i need a mask of {t} please
the next structure is {t}
please measure {t} so outline it first
hello i would like {t} outlined
contour {t} period next patient
please contour uh yes {t}
for the record please outline {t}
okay now please do {t}
we want to see {t} on this {m}
you can start with {t} please
segment for me please {t} full stop
note to the lab please contour {t}
paragraph please outline {t} paragraph
""",
    "val": """
straight away please mark {t} stop
erm could you mark {t} for me
begin note mark {t} end note
the thing i want outlined is {t} period
so yeah mark {t} if you could
er {t} please outline that
on this one please mark out {t}
message for the lab {t} to be marked
listen please outline {t} okay thanks
one structure today namely {t}
""",
    "test": """
okay then trace {t} question mark no full stop
hey assistant trace {t}
er hang on yes {t} trace that please
let's see extract {t} close brackets
voice memo please delineate {t} end of memo
speaking of {t} please trace it full stop
okay go delineate {t}
scratch that trace {t} instead
you know what just trace {t}
memo to {dr} please delineate {t}
correction i meant {t} please trace
kindly delineate colon {t}
well the object is {t} stop
please extract em {t} from the {m}
transcript follows delineate {t} transcript ends
ah yes and {t} should be traced full stop
tell the lab to trace {t}
start tracing {t} please over
mm hmm {t} delineate that one
quick memo trace {t} by {day} thanks
""",
}

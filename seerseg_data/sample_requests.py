"""Requests of the samples: the words of a clinic for the structures that each scan shows, and for some that it does not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Said:
    """One request. target: a label of the sample, several (their union), or None: not in this scan."""

    id: str
    text: str
    target: str | tuple[str, ...] | None
    style: str


CT_CHEST = (
    Said("left-lung-label", "left lung", "left lung", "label_prompt"),
    Said("right-lung-label", "right lung", "right lung", "label_prompt"),
    Said("ribs-label", "ribs", "ribs", "label_prompt"),
    Said("spine-label", "vertebral column", "vertebral column", "label_prompt"),
    Said("left-lung-typo", "plz segmnt the lft lnug", "left lung", "messy_or_misspelled"),
    Said(
        "left-lung-wordy",
        "Thank you for seeing this patient. Before the planned operation, could you please kindly outline for us the whole of "
        "the left lung, so that its volume can be measured?",
        "left lung",
        "verbose_request",
    ),
    Said("left-lung-not", "the lung that is not the right one", "left lung", "negated"),
    Said("right-lung-abbreviated", "R lung seg", "right lung", "abbr_or_short"),
    Said("right-lung-lay", "the breathing organ on the patient's right side", "right lung", "lay"),
    Said("right-lung-report", "Volumetry requested. Target: pulmo dexter.", "right lung", "report_style"),
    Said("ribs-typo", "all teh ribz pls", "ribs", "messy_or_misspelled"),
    Said("ribs-lay", "the bones that form the cage of the chest", "ribs", "lay"),
    Said("spine-lay", "the backbone", "vertebral column", "lay"),
    Said("spine-abbreviated", "whole C/T/L spine", "vertebral column", "ambiguous_abbreviation"),
    Said("absent-brain", "outline the left hippocampus", None, "out_of_region_reference"),
    Said("absent-pelvis", "please contour the prostate", None, "out_of_region_reference"),
)

SPINE_CT = (
    Said("l3-label", "vertebra L3", "vertebra L3", "label_prompt"),
    Said("spinous-label", "spinous process", "spinous process", "label_prompt"),
    Said("body-label", "vertebral body", "vertebral body", "label_prompt"),
    Said("l3-words", "the third vertebra of the lower back", "vertebra L3", "lay"),
    Said("l3-typo", "vertbra l3 pleas", "vertebra L3", "messy_or_misspelled"),
    Said("l4-short", "L4", "vertebra L4", "abbr_or_short"),
    Said("spinous-lay", "the bumps of bone that one feels along the back", "spinous process", "lay"),
    Said("left-transverse", "proc. transversus sin.", "left transverse process", "report_style"),
    Said("not-left", "transverse processes, but not those on the left", "right transverse process", "negated"),
    Said(
        "facets",
        "both superior articular processes",
        ("left superior articular process", "right superior articular process"),
        "formal_task",
    ),
    Said("arch", "For planning of a laminectomy, kindly contour the vertebral arches.", "vertebral arch", "clinical_request"),
    Said("absent-disc", "segment the intervertebral disc C5/C6", None, "out_of_region_reference"),
    Said("absent-heart", "left ventricle of the heart", None, "out_of_region_reference"),
)

SPINE_MR = (
    Said("cord-label", "spinal cord", "spinal cord", "label_prompt"),
    Said("discs-label", "intervertebral discs", "intervertebral discs", "label_prompt"),
    Said("body-label", "vertebral body", "vertebral body", "label_prompt"),
    Said("cord-lay", "the bundle of nerves that runs down inside the backbone", "spinal cord", "lay"),
    Said("cord-typo", "spnial crod", "spinal cord", "messy_or_misspelled"),
    Said("canal", "canalis vertebralis, ?stenosis", "spinal canal", "report_style"),
    Said("discs-lay", "the cushions between the vertebrae", "intervertebral discs", "lay"),
    Said("discs-short", "IVDs", "intervertebral discs", "abbr_or_short"),
    Said("bodies-order", "Order: MR spine. Region of interest: corpora vertebrarum, without arches.", "vertebral body", "clinical_request"),
    Said("behind", "the tunnel of bone and ligament behind the vertebral bodies, with what runs in it", "spinal canal", "relational"),
    Said("not-right", "the transverse processes that are not on the right", "left transverse process", "negated"),
    Said("absent-hippocampus", "left hippocampus", None, "out_of_region_reference"),
    Said("absent-eye", "the right eye", None, "out_of_region_reference"),
)


def _tumour(organ: str, side: str) -> tuple[Said, ...]:
    adjective = {"lung": "pulmonary", "brain": "intracranial"}[organ]
    target = f"{organ} tumour"
    return (
        Said("label", target, target, "label_prompt"),
        Said("side", f"the mass in the {side} half of the {organ if organ == 'brain' else 'chest'}", target, "relational"),
        Said("typo", f"{organ} tumuor segmentaton plz", target, "messy_or_misspelled"),
        Said("short", "outline tumour", target, "abbr_or_short"),
        Said("lay", f"the growth in the patient's {organ}", target, "lay"),
        Said("report", f"Space-occupying {adjective} lesion, {side}. Volumetry requested.", target, "report_style"),
        Said(
            "wordy",
            f"We would be grateful if you could delineate for us, as exactly as the pictures allow, the {adjective} tumour for which "
            "this patient is going to be treated next week.",
            target,
            "verbose_request",
        ),
        Said("us-spelling", f"Segment the {organ} tumor.", target, "formal_task"),
        Said("absent-bladder", "urinary bladder", None, "out_of_region_reference"),
        Said(
            "absent-organ", {"lung": "the left hippocampus", "brain": "the organ that makes bile"}[organ], None, "out_of_region_reference"
        ),
    )


LUNG_TUMOURS = {1: _tumour("lung", "right"), 2: _tumour("lung", "left")}
BRAIN_TUMOURS = {1: _tumour("brain", "left"), 2: _tumour("brain", "left")}

COLIN27 = (
    Said("left-hippocampus-label", "left hippocampus", "left hippocampus", "label_prompt"),
    Said("right-thalamus-label", "right thalamus", "right thalamus", "label_prompt"),
    Said("cerebellum-label", "cerebellum", "cerebellum", "label_prompt"),
    Said("hippocampus-lay", "the seahorse of the brain on the patient's left, where memories are made", "left hippocampus", "lay"),
    Said("hippocampus-typo", "lft hipocampus plz", "left hippocampus", "messy_or_misspelled"),
    Said("motor-strip", "primary motor strip, right", "right precentral gyrus", "clinical_request"),
    Said("both-caudates", "both caudate nuclei", ("left caudate nucleus", "right caudate nucleus"), "formal_task"),
    Said("not-left-amygdala", "the amygdala, not the left one", "right amygdala", "negated"),
    Said("acc", "L ACC", "left anterior cingulate gyrus", "ambiguous_abbreviation"),
    Said("sma", "SMA on the right", "right supplementary motor area", "ambiguous_abbreviation"),
    Said("vermis", "the worm between the halves of the cerebellum", "cerebellar vermis", "relational"),
    Said("putamen", "Putamen sinister: Volumen bestimmen", "left putamen", "report_style"),
    Said("absent-tumour", "the tumour in the left temporal lobe", None, "absent"),
    Said("absent-kidney", "right kidney", None, "out_of_region_reference"),
)

MNI152 = (
    Said("grey-label", "grey matter", "grey matter", "label_prompt"),
    Said("white-label", "white matter", "white matter", "label_prompt"),
    Said("grey-us", "gray matter segmentation", "grey matter", "formal_task"),
    Said("grey-short", "GM", "grey matter", "abbr_or_short"),
    Said("white-short", "WM mask", "white matter", "abbr_or_short"),
    Said("white-typo", "whit mater", "white matter", "messy_or_misspelled"),
    Said("grey-lay", "the part of the brain that holds the bodies of the nerve cells", "grey matter", "lay"),
    Said("white-not", "brain tissue that is not grey matter", "white matter", "negated"),
    Said("absent-tumour", "enhancing tumour", None, "absent"),
    Said("absent-lung", "left lung", None, "out_of_region_reference"),
)

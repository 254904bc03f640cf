"""The words the nano segmenter is trained on: canonical names, synonyms and abbreviations, regions, and words that name nothing it knows.

A paired structure yields three concepts: "left X", "right X" and the union under its plural or whole name.
"""

from __future__ import annotations

import random
from typing import Final

__all__ = ["CANONICAL", "REGION", "corrupt", "other_words", "surface_forms", "swap_side"]

# region -> canonical name -> synonyms. Canonical names are those of the request vocabulary: lower case, anatomically whole.
_SINGLE: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "chest": {
        "ribs": ("rib", "rib cage", "ribcage", "costae", "costal bones", "rib bones", "bony thorax"),
        "thoracic vertebral column": (
            "thoracic spine",
            "t spine",
            "tspine",
            "thoracic vertebrae",
            "dorsal spine",
            "th spine",
            "mid back spine",
        ),
        "sternum": ("breastbone", "breast bone", "chest bone"),
        "trachea": ("windpipe", "wind pipe", "airway"),
        "heart": ("cardiac silhouette", "cor", "heart muscle and chambers", "pump of the blood", "cardiac"),
        "oesophagus": ("esophagus", "gullet", "food pipe", "oesoph", "esoph"),
        "lung tumour": ("lung tumor", "pulmonary mass", "lung mass", "lung cancer", "lung lesion", "pulmonary nodule", "nsclc"),
    },
    "trunk": {
        "vertebral column": (
            "spine",
            "backbone",
            "spinal column",
            "vertebrae",
            "columna vertebralis",
            "vertebra",
            "back bone",
            "vertebral bones",
        ),
        "aorta": ("main artery", "aortic vessel", "ao", "thoracic and abdominal aorta", "great artery"),
        "inferior vena cava": ("ivc", "vena cava inferior", "caval vein", "vena cava"),
        "spinal cord": ("medulla spinalis", "cord", "myelon"),
        "intervertebral discs": ("discs", "disks", "intervertebral disc", "disc", "vertebral discs", "intervertebral disks"),
        "lumbar vertebral column": ("lumbar spine", "l spine", "lspine", "lumbar vertebrae", "lower back spine", "lumbar backbone"),
    },
    "abdomen": {
        "liver": ("hepar", "hepatic organ", "hepatic parenchyma", "liver parenchyma", "hepatic", "liver organ"),
        "spleen": ("lien", "splenic organ", "splenic", "milt", "spleen parenchyma"),
        "stomach": ("gaster", "gastric", "ventriculus", "tummy organ", "gastric lumen and wall"),
        "gallbladder": ("gall bladder", "cholecyst", "vesica biliaris", "gb", "bile sac"),
        "pancreas": ("pancreatic gland", "pancreatic", "panc", "pancreas gland"),
        "duodenum": ("duodenal loop", "duod", "first part of the small bowel"),
        "colon": ("large bowel", "large intestine", "colonic frame", "big bowel", "colon bowel"),
        "small bowel": ("small intestine", "jejunum and ileum", "bowel loops", "sb", "small gut"),
        "portal and splenic vein": ("portal vein and splenic vein", "portal vein", "splenic vein", "pv"),
        "vertebra l1": ("l1", "first lumbar vertebra", "l1 vertebra"),
        "vertebra l2": ("l2", "second lumbar vertebra", "l2 vertebra"),
        "vertebra l3": ("l3", "third lumbar vertebra", "l3 vertebra"),
        "vertebra l4": ("l4", "fourth lumbar vertebra", "l4 vertebra"),
        "vertebra l5": ("l5", "fifth lumbar vertebra", "l5 vertebra"),
        "vertebra t12": ("t12", "twelfth thoracic vertebra", "th12"),
    },
    "pelvis": {
        "urinary bladder": ("bladder", "vesica urinaria", "urine bladder", "ub", "bladder urinary"),
        "sacrum": ("sacral bone", "os sacrum", "sacral spine", "sacral vertebrae"),
        "prostate": ("prostate gland", "prostatic gland"),
    },
    "head": {
        "brain": ("whole brain", "encephalon", "cerebral tissue", "brain tissue", "brain parenchyma"),
        "skull": ("cranium", "skull bone", "cranial bone", "calvarium"),
        "cerebellum": ("little brain", "cerebellar hemispheres", "cblm", "hindbrain cerebellum"),
        "brainstem": ("brain stem", "truncus encephali", "midbrain pons and medulla"),
        "mandible": ("lower jaw", "jaw bone", "jawbone", "mandibula"),
        "anterior hippocampus": (
            "hippocampal head",
            "head of the hippocampus",
            "anterior hippocampal part",
            "front part of the hippocampus",
            "ant hippocampus",
            "anterior hippo",
            "hippocampus anterior",
            "uncal hippocampus",
            "anterior portion of hippocampus",
            "ant hipp",
        ),
        "posterior hippocampus": (
            "hippocampal body and tail",
            "body and tail of the hippocampus",
            "hippocampal tail",
            "back part of the hippocampus",
            "post hippocampus",
            "posterior hippo",
            "hippocampus posterior",
            "posterior portion of hippocampus",
            "post hipp",
            "rear part of the hippocampus",
        ),
        "brain tumour": (
            "brain tumor",
            "glioma",
            "intracranial tumour",
            "cerebral neoplasm",
            "brain lesion",
            "brain mass",
            "gbm",
            "whole tumour",
        ),
        "tumour core": ("tumor core", "necrotic core", "core of the tumour", "necrosis", "non enhancing core"),
        "peritumoural oedema": ("edema", "oedema", "peritumoral edema", "swelling around the tumour", "tumour oedema"),
        "enhancing tumour": ("enhancing tumor", "contrast enhancing tumour", "enhancing rim", "enhancement"),
    },
    "neck": {"cervical vertebral column": ("cervical spine", "c spine", "cspine", "neck spine", "cervical vertebrae", "neck bones")},
    "spine": {
        "vertebral body": ("corpus vertebrae", "vertebral corpus", "body of the vertebra", "vertebral bodies"),
        "vertebral arch": ("arcus vertebrae", "neural arch", "posterior elements arch", "lamina"),
        "spinous process": ("processus spinosus", "spinous", "dorsal process of the vertebra"),
        "spinal canal": ("vertebral canal", "canalis vertebralis", "thecal sac"),
    },
}

# region -> singular stem -> (canonical name of the union, synonyms of the stem, synonyms of the union).
_PAIRED: Final[dict[str, dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]]] = {
    "chest": {
        "lung": (
            "lungs",
            ("pulmo", "pulmonary parenchyma", "lung field", "lung parenchyma"),
            ("both lungs", "pulmonary parenchyma", "lung fields", "airspaces", "lung", "respiratory organs"),
        ),
        "rib": ("ribs", ("ribs", "costae", "hemithorax ribs", "rib bones"), ()),
        "scapula": ("scapulae", ("shoulder blade", "shoulderblade"), ("shoulder blades", "scapulas", "scapula")),
        "clavicle": ("clavicles", ("collar bone", "collarbone"), ("collar bones", "clavicle", "collarbones")),
    },
    "abdomen": {
        "kidney": (
            "kidneys",
            ("ren", "renal parenchyma", "renal organ"),
            ("both kidneys", "renes", "renal parenchyma", "kidney", "organs that make urine"),
        ),
        "adrenal gland": (
            "adrenal glands",
            ("suprarenal gland", "adrenal", "suprarenal"),
            ("adrenals", "suprarenal glands", "adrenal gland"),
        ),
        "iliopsoas": ("iliopsoas muscles", ("psoas", "psoas muscle", "iliopsoas muscle"), ("psoas muscles", "psoas", "iliopsoas")),
        "autochthonous back muscle": (
            "autochthonous back muscles",
            ("autochthon", "erector spinae", "deep back muscle", "paraspinal muscle"),
            ("erector spinae", "paraspinal muscles", "deep back muscles"),
        ),
    },
    "pelvis": {
        "hip bone": (
            "hip bones",
            ("hip", "innominate bone", "iliac bone", "os coxae", "coxal bone"),
            ("pelvic bones", "hips", "ossa coxae", "bony pelvis"),
        ),
        "femur": ("femurs", ("thigh bone", "femoral bone", "thighbone"), ("femora", "thigh bones", "femur")),
        "gluteus maximus": (
            "gluteus maximus muscles",
            ("glut max", "gluteus max", "largest buttock muscle"),
            ("gluteus maximus", "glutei maximi"),
        ),
        "gluteus medius": ("gluteus medius muscles", ("glut med", "gluteus med"), ("gluteus medius", "glutei medii")),
        "gluteus minimus": ("gluteus minimus muscles", ("glut min", "gluteus min"), ("gluteus minimus", "glutei minimi")),
        "iliac artery": ("iliac arteries", ("arteria iliaca", "common iliac artery"), ("iliac artery", "common iliac arteries")),
        "iliac vein": ("iliac veins", ("vena iliaca", "common iliac vein", "iliac vena"), ("iliac vein", "common iliac veins")),
    },
    "head": {
        "hippocampus": (
            "hippocampus",
            ("hippocampal formation", "hippo", "hipp"),
            ("hippocampi", "hippocampal formation", "whole hippocampus", "seahorse of the brain", "hippo", "both hippocampi"),
        ),
        "amygdala": ("amygdala", ("amygdaloid body", "amyg"), ("amygdalae", "amygdaloid bodies", "amygdalas")),
        "caudate nucleus": ("caudate nucleus", ("caudate", "nucleus caudatus"), ("caudate nuclei", "caudate", "caudates")),
        "putamen": ("putamen", ("putaminal nucleus",), ("putamina", "putamens")),
        "pallidum": ("pallidum", ("globus pallidus", "gp"), ("globus pallidus", "pallida")),
        "thalamus": ("thalamus", ("thalamic nucleus", "thal"), ("thalami", "thalamic nuclei")),
        "insula": ("insula", ("insular cortex", "island of reil"), ("insular cortex", "insulae")),
        "frontal lobe": ("frontal lobes", ("frontal cortex", "lobus frontalis"), ("frontal lobe", "frontal cortex")),
        "temporal lobe": ("temporal lobes", ("temporal cortex", "lobus temporalis"), ("temporal lobe", "temporal cortex")),
        "parietal lobe": ("parietal lobes", ("parietal cortex", "lobus parietalis"), ("parietal lobe", "parietal cortex")),
        "occipital lobe": (
            "occipital lobes",
            ("occipital cortex", "lobus occipitalis"),
            ("occipital lobe", "occipital cortex", "visual cortex"),
        ),
        "cerebellar hemisphere": ("cerebellum", ("cerebellum", "cerebellar half"), ()),
        "cerebral hemisphere": (
            "cerebrum",
            ("hemisphere", "half of the cerebrum", "brain hemisphere"),
            ("cerebral hemispheres", "telencephalon"),
        ),
        "lateral ventricle": (
            "lateral ventricles",
            ("ventricle", "lv", "cerebral ventricle"),
            ("ventricles", "lateral ventricle", "cerebral ventricles"),
        ),
        "eyeball": ("eyeballs", ("eye", "globe", "bulbus oculi", "orbital globe"), ("eyes", "globes", "eyeball")),
    },
}

_OTHER: Final = (
    "uterus ovary testis penis vagina thyroid parotid tongue tooth teeth lens optic nerve larynx pharynx tonsil patella tibia "
    "fibula humerus radius ulna wrist hand foot ankle knee meniscus cruciate ligament achilles tendon appendix breast nipple "
    "skin fat lymph node thymus placenta fetus umbilical cord carotid jugular cochlea pineal pituitary corpus callosum "
    "olfactory bulb retina eyelid nostril elbow finger toe table pillow pacemaker catheter stent screw implant bottle bicycle "
    "banana guitar tree river house dog cat car phone cloud mountain sandwich blue quickly nothing something everything image "
    "scan slice patient doctor hello please thanks unknown thing stuff background noise "
).split()


def _build() -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    forms: dict[str, tuple[str, ...]] = {}
    region: dict[str, str] = {}
    for place, table in _SINGLE.items():
        for name, words in table.items():
            forms[name], region[name] = words, place
    for place, pairs in _PAIRED.items():
        for stem, (union, words, union_words) in pairs.items():
            forms[union] = (*forms.get(union, ()), *union_words)
            region.setdefault(union, place)
            for side in ("left", "right"):
                name = f"{side} {stem}" if stem != "rib" else f"{side} ribs"
                forms[name], region[name] = tuple(words), place
    return forms, region


_FORMS, REGION = _build()
REGION = dict(REGION)
"""Canonical name -> "chest", "trunk", "abdomen", "pelvis", "head", "neck" or "spine"."""
CANONICAL: Final[tuple[str, ...]] = tuple(sorted(_FORMS))
"""Every canonical name, sorted."""

_SIDE_WORDS: Final = {
    "left": ("left", "left", "lt", "l", "lft", "left sided"),
    "right": ("right", "right", "rt", "r", "rgt", "right sided"),
}
_FRAMES: Final = (
    "segment the {}",
    "please outline the {}",
    "the {}",
    "show me the {}",
    "{} segmentation",
    "contour {}",
    "mask of the {}",
    "find {}",
    "plz mark {}",
    "delineate the {}",
    "where is the {}",
    "i need the {}",
    "{} please",
    "can you draw the {}",
)


def swap_side(name: str) -> str:
    """The canonical name of the mirrored structure; itself when it names no side."""
    if name.startswith("left "):
        return "right " + name[5:]
    if name.startswith("right "):
        return "left " + name[6:]
    return name


def surface_forms(name: str, rng: random.Random, *, exact: float = 0.35, slips: float = 0.3) -> str:
    """One way of writing a canonical name: itself (share `exact`), else a synonym, its side in words, framed or misspelt (`slips`)."""
    if rng.random() < exact:
        return name
    words = _FORMS[name]
    side = name.split(" ", 1)[0]
    if side in _SIDE_WORDS:
        stem = rng.choice([name.split(" ", 1)[1], *words])
        word = rng.choice(_SIDE_WORDS[side])
        style = rng.random()
        if style < 0.6:
            text = f"{word} {stem}"
        elif style < 0.75:
            text = f"{stem} {word}"
        elif style < 0.85:
            text = f"{stem} ({word})"
        else:
            text = f"{stem} on the {side} side" if rng.random() < 0.5 else f"{side}-sided {stem}"
    else:
        text = rng.choice([name, *words])
    if rng.random() < slips:
        text = corrupt(text, rng)
    if rng.random() < 0.2:
        text = rng.choice(_FRAMES).format(text)
    if rng.random() < 0.1:
        text = text.upper() if rng.random() < 0.5 else text.capitalize()
    return text


def corrupt(text: str, rng: random.Random) -> str:
    """One or two slips of the keyboard (swap, drop, double, replace) in words of four letters or more, first letters kept."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 4]
    for index in rng.sample(long, min(len(long), 1 + (rng.random() < 0.3))):
        word = words[index]
        at = rng.randrange(1, len(word) - 1)
        slip = rng.randrange(5)
        if slip == 0:
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        elif slip == 1:
            word = word[:at] + word[at + 1 :]
        elif slip == 2:
            word = word[:at] + word[at] + word[at:]
        elif slip == 3:
            word = word[:at] + rng.choice("abcdefghijklmnoprstuvwy") + word[at + 1 :]
        else:
            word = word[:1] + "".join(c for c in word[1:] if c not in "aeiou" or rng.random() < 0.5)
        words[index] = word
    return " ".join(words)


def other_words(rng: random.Random) -> str:
    """A text that names no canonical structure: everyday words, other anatomy, or a made-up word, sometimes with a side."""
    if rng.random() < 0.3:
        text = "".join(rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
    else:
        text = " ".join(rng.sample(_OTHER, rng.choice((1, 1, 1, 2))))
    if rng.random() < 0.25:
        text = rng.choice(("left ", "right ")) + text
    if rng.random() < 0.15:
        text = rng.choice(_FRAMES).format(text)
    return text


AAL_GROUPS: Final = {
    "hippocampus": ("Hippocampus",),
    "amygdala": ("Amygdala",),
    "caudate nucleus": ("Caudate",),
    "putamen": ("Putamen",),
    "pallidum": ("Pallidum",),
    "thalamus": ("Thalamus",),
    "insula": ("Insula",),
    "frontal lobe": ("Frontal", "Precentral", "Rolandic", "Supp_Motor", "Olfactory", "Rectus", "Paracentral"),
    "temporal lobe": ("Temporal", "Heschl", "Fusiform", "ParaHippocampal"),
    "parietal lobe": ("Parietal", "Postcentral", "SupraMarginal", "Angular", "Precuneus"),
    "occipital lobe": ("Occipital", "Calcarine", "Cuneus", "Lingual"),
    "cerebellar hemisphere": ("Cerebelum",),
}
"""Stem of a paired structure -> how the names of its AAL regions begin ("Hippocampus" of "Hippocampus_L")."""


def aal_structures(names: dict[int, str]) -> dict[str, tuple[int, ...]]:
    """AAL names (value -> e.g. "Hippocampus_L") -> canonical structures of each side, and the cerebellum with its vermis."""
    out: dict[str, tuple[int, ...]] = {}
    for stem, starts in AAL_GROUPS.items():
        for side, letter in (("left", "_L"), ("right", "_R")):
            values = tuple(value for value, name in names.items() if name.startswith(starts) and name.endswith(letter))
            if values:
                out[f"{side} {stem}"] = values
    out["cerebellum"] = tuple(value for value, name in names.items() if name.startswith(("Cerebelum", "Cerebellum", "Vermis")))
    return out

"""The vocabulary: its file against the schema, what it covers, how names are found in it, and how a dataset adds to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.errors import DatasetError, ModelError
from seerseg.vocabulary import CONTRASTS, DEFAULT_FILE, LabelDescription, Vocabulary, fold, singular, words
from seerseg_data import nano_vocabulary

VOCABULARY = Vocabulary.load()
TRAIN = VOCABULARY.only(["train"])
REPOSITORY = Path(__file__).parents[1]
LABEL_LISTS = REPOSITORY / "seerseg_data" / "label_lists.json"
SHARED = REPOSITORY.parent / "shared" / "data"

# Label identifiers as datasets publish them -> the canonical name that they mean.
LABELS = {
    "spleen": "spleen",
    "kidney_left": "left kidney",
    "kidney_right": "right kidney",
    "gall_bladder": "gallbladder",
    "liver": "liver",
    "lung_upper_lobe_left": "left lung upper lobe",
    "lung_middle_lobe_right": "right lung middle lobe",
    "lung_lower_lobe_right": "right lung lower lobe",
    "esophagus": "oesophagus",
    "small_bowel": "small bowel",
    "urinary_bladder": "urinary bladder",
    "kidney_cyst_left": "left kidney cyst",
    "sacrum": "sacrum",
    "vertebrae_S1": "vertebra S1",
    "vertebrae_L5": "vertebra L5",
    "vertebrae_T12": "vertebra T12",
    "vertebrae_C7": "vertebra C7",
    "heart": "heart",
    "pulmonary_vein": "pulmonary vein",
    "brachiocephalic_vein_left": "left brachiocephalic vein",
    "subclavian_artery_right": "right subclavian artery",
    "common_carotid_artery_left": "left common carotid artery",
    "atrial_appendage_left": "left atrial appendage",
    "superior_vena_cava": "superior vena cava",
    "portal_vein_and_splenic_vein": "portal vein",
    "iliac_artery_left": "left common iliac artery",
    "iliac_vena_right": "right common iliac vein",
    "humerus_left": "left humerus",
    "scapula_right": "right scapula",
    "clavicula_left": "left clavicle",
    "femur_right": "right femur",
    "hip_left": "left hip bone",
    "spinal_cord": "spinal cord",
    "gluteus_maximus_left": "left gluteus maximus",
    "autochthon_right": "right autochthonous back muscle",
    "iliopsoas_left": "left iliopsoas",
    "brain": "brain",
    "skull": "skull",
    "rib_left_1": "left rib 1",
    "rib_right_12": "right rib 12",
    "sternum": "sternum",
    "costal_cartilages": "costal cartilages",
    "thyroid_gland": "thyroid gland",
    "prostate": "prostate",
    "vertebrae": "vertebral column",
    "intervertebral_discs": "intervertebral discs",
    "heart_ventricle_left": "heart left ventricle",
    "heart_atrium_right": "heart right atrium",
    "heart_myocardium": "myocardium",
    "lung_left": "left lung",
    "lung": "lungs",
    "Precentral_L": "left precentral gyrus",
    "Frontal_Sup_Orb_R": "right orbital superior frontal gyrus",
    "Cingulum_Ant_L": "left anterior cingulate gyrus",
    "Hippocampus_R": "right hippocampus",
    "ParaHippocampal_L": "left parahippocampal gyrus",
    "Amygdala_L": "left amygdala",
    "Calcarine_R": "right calcarine cortex",
    "Caudate_L": "left caudate nucleus",
    "Putamen_R": "right putamen",
    "Pallidum_L": "left pallidum",
    "Thalamus_R": "right thalamus",
    "Heschl_L": "left heschl gyrus",
    "Temporal_Pole_Mid_R": "right middle temporal pole",
    "Cerebelum_Crus1_L": "left cerebellum crus 1",
    "Cerebelum_4_5_R": "right cerebellum lobule 4 5",
    "Vermis_4_5": "vermis 4 5",
    "Supp_Motor_Area_L": "left supplementary motor area",
    "Paracentral_Lobule_R": "right paracentral lobule",
    "Insula_L": "left insula",
    "Rectus_R": "right gyrus rectus",
    "edema": "peritumoural oedema",
    "enhancing tumor": "enhancing tumour",
    "necrotic tumor core": "non-enhancing tumour core",
    "metastasis": "brain metastasis",
    "stroke": "stroke lesion",
    "MS lesion": "multiple sclerosis lesion",
    "left ventricle": "heart left ventricle",
    "renal tumor": "kidney tumour",
    "bladder": "urinary bladder",
    "bone": "bones",
    "lungs": "lungs",
    "duodenum": "duodenum",
    "inferior vena cava": "inferior vena cava",
    "adrenal_gland_right": "right adrenal gland",
    "left hip": "left hip bone",
    "spinous process": "spinous process",
    "costal_process_left": "left transverse process",
    "vertebra corpus": "vertebral body",
    "spinal_canal": "spinal canal",
    "anterior hippocampus": "anterior hippocampus",
    "lumbar spine": "lumbar vertebral column",
    "cervical vertebral column": "cervical vertebral column",
    "T-spine": "thoracic vertebral column",
    "spine": "vertebral column",
}


@pytest.mark.parametrize("label", LABELS)
def test_labels_of_published_datasets_resolve(label: str) -> None:
    entry = VOCABULARY.resolve(label)
    assert entry is not None
    assert entry.name == LABELS[label]


def test_every_structure_has_a_region_and_consistent_links() -> None:
    assert len(VOCABULARY.names) > 550
    for entry in VOCABULARY:
        assert entry.regions, entry.name
        assert entry.surfaces[0].text == entry.name
        assert entry.surfaces[0].kind == "name"
        if entry.twin is not None:
            assert VOCABULARY[entry.twin].twin == entry.name
        assert all(member in VOCABULARY for member in entry.members)
        assert entry.part_of is None or entry.part_of in VOCABULARY
        assert {s.split for s in entry.surfaces} <= {"train", "val", "test"}
        assert "{" not in "".join(s.text for s in entry.surfaces)


def test_canonical_names_find_themselves() -> None:
    for name in VOCABULARY.names:
        assert VOCABULARY.lookup(name)[0].entry.name == name, name


def test_the_file_names_its_sources_and_holds_no_field_twice() -> None:
    data = json.loads(DEFAULT_FILE.read_text(encoding="utf-8"))
    assert len(data["sources"]) >= 2
    names = [entry["name"] for entry in data["entries"]]
    assert len(names) == len(set(names))


def test_sides_numbers_and_pairs_are_made_from_one_entry() -> None:
    left, pair = VOCABULARY["left kidney"], VOCABULARY["kidneys"]
    assert (left.side, left.twin, left.base) == ("left", "right kidney", "kidney")
    assert pair.members == ("left kidney", "right kidney")
    assert "LK" in left.texts()
    assert "LK" not in VOCABULARY["right kidney"].texts()
    assert VOCABULARY["left lung upper lobe"].part_of == "left lung"
    assert "fifth rib" in VOCABULARY["left rib 5"].texts()
    assert VOCABULARY["heart left ventricle"].twin == "heart right ventricle"


def test_a_structure_is_put_together_from_its_pieces() -> None:
    lobes = ("right lung upper lobe", "right lung middle lobe", "right lung lower lobe")
    assert VOCABULARY.pieces("hippocampus", {"anterior hippocampus", "posterior hippocampus"}) == (
        "anterior hippocampus",
        "posterior hippocampus",
    )
    assert VOCABULARY.pieces("lungs", {"left lung", *lobes}) == ("left lung", *lobes)
    assert VOCABULARY.pieces("lungs", {"left lung", *lobes, "lungs"}) == ("lungs",)
    assert VOCABULARY.pieces("lungs", {"left lung", *lobes[:2]}) == ()
    assert VOCABULARY.pieces("no such thing", {"left lung"}) == ()
    assert VOCABULARY.wholes("hippocampal tail") == ("posterior hippocampus", "hippocampus")
    assert VOCABULARY.wholes("left kidney") == ("kidneys",)
    assert VOCABULARY.wholes("hippocampus") == ()


def test_whatever_is_made_of_pieces_can_be_drawn_from_them_and_is_above_them() -> None:
    for entry in VOCABULARY:
        if entry.made_of:
            assert set(VOCABULARY.pieces(entry.name, entry.made_of)) == set(entry.made_of)
            assert all(entry.name in VOCABULARY.wholes(piece) for piece in entry.made_of)
            assert entry.name not in VOCABULARY.wholes(entry.name), "a structure is no piece of itself"


def test_an_abbreviation_keeps_all_it_can_mean() -> None:
    meant = {candidate.entry.base for candidate in VOCABULARY.lookup("LV")}
    assert {"heart left ventricle", "lateral ventricle"} <= meant
    assert {"portal vein", "pulmonary vein"} <= {c.entry.base for c in VOCABULARY.lookup("PV")}


def test_all_that_a_text_can_mean_is_one_call() -> None:
    def meant(text: str) -> list[str]:
        return [entry.name for entry in VOCABULARY.meanings(text)]

    assert meant("LV") == ["heart left ventricle", "left lateral ventricle"]
    assert set(meant("SMA")) == {"superior mesenteric artery", "supplementary motor areas"}
    assert meant("kidney") == ["kidneys"], "a side left open is no second meaning"
    assert meant("left kidney") == ["left kidney"]
    assert meant("organ that makes urine") == ["kidneys"]
    assert meant("Organ that makes bile!") == ["liver"]
    assert meant("organ between the spleen and the vertebral column") == ["left kidney"]
    assert meant("teddy bear") == []


def test_what_is_said_of_one_side_is_a_form_of_that_side_alone() -> None:
    relation = "organ between the spleen and the vertebral column"
    assert relation in VOCABULARY["left kidney"].texts(kinds=["relation"])
    assert relation not in VOCABULARY["right kidney"].texts() + VOCABULARY["kidneys"].texts()


def test_entries_tell_what_structures_look_like() -> None:
    assert VOCABULARY["left lung"].appearance("CT") == ("air-dark with bright vessels",)
    assert VOCABULARY["peritumoural oedema"].appearance("FLAIR") == ("bright area around the tumour",)
    assert VOCABULARY["liver"].appearance("ultrasound") == ()
    for entry in VOCABULARY:
        assert all(contrast in CONTRASTS for contrast, _ in entry.cues)
        seen_in = {"CT" if contrast.startswith("CT") else "MR" for contrast, _ in entry.cues}
        assert seen_in <= set(entry.modalities), entry.name


LISTS: list[dict[str, Any]] = json.loads(LABEL_LISTS.read_text(encoding="utf-8"))["lists"]


@pytest.mark.parametrize("listed", LISTS, ids=[listed["dataset"] for listed in LISTS])
def test_every_published_label_resolves_by_training_words_alone(listed: dict[str, Any]) -> None:
    assert all(listed[key] for key in ("labels", "source", "read", "modalities"))
    for label, told in listed["labels"].items():
        entry = TRAIN.resolve(label)
        assert set(listed["modalities"]) <= set(VOCABULARY[told["means"]].modalities), label
        assert bool(told.get("in_context")) is (entry is None or entry.name != told["means"]), label


def test_the_lists_cover_the_datasets_that_seerseg_converts() -> None:
    counts = {listed["dataset"]: len(listed["labels"]) for listed in LISTS}
    assert counts["TotalSegmentator CT"] == 117
    assert counts["TotalSegmentator MR"] == 50
    assert counts["AAL-116"] == 116
    assert sum(name.startswith("MSD Task") for name in counts) == 10
    wanted = "BraTS 2021,BraTS 2023 GLI,BraTS 2024 GLI,BrainMetShare,ISLES 2022,MSSEG 2016,HVSMR-2.0,PENGWIN CT,KiTS23,AbdomenCT-1K,FLARE22"
    assert {*wanted.split(","), "AMOS22", "CT-ORG", "SPIDER", "TPTBox vertebra parts"} <= set(counts)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans of development are not on this machine")
def test_every_label_of_the_real_scans_resolves() -> None:
    labels = set(json.loads((SHARED / "mr_hippocampus" / "dataset.json").read_text())["labels"]) - {"background"}
    labels |= set(json.loads((SHARED / "ct_torso" / "label_v2_fast.json").read_text()).values())
    for name in ("ct_torso", "mr_glioma"):
        labels |= {told["name"] for told in json.loads((SHARED / name / "labels.json").read_text())["labels"].values()}
    assert [label for label in sorted(labels) if TRAIN.resolve(label) is None] == []


def test_a_side_is_kept_wherever_it_stands_and_never_contradicted() -> None:
    for text in ("left kidney", "kidney, left", "LEFT renal", "kidney_L", "Lt. kidney", "left-sided kidney"):
        assert {c.entry.name for c in VOCABULARY.lookup(text)} == {"left kidney"}, text
    assert [c.entry.name for c in VOCABULARY.lookup("kidney")] == ["kidneys", "left kidney", "right kidney"]
    assert [c.entry.name for c in VOCABULARY.lookup("right spleen")] == []
    assert VOCABULARY.lookup("teddy bear") == []


def test_texts_are_chosen_by_kind_and_language_split(tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.json"
    forms: list[Any] = ["hepar", {"form": "iecur", "split": "test"}, {"form": "jecur", "split": "val"}]
    file.write_text(
        json.dumps({"schema": 1, "entries": [{"name": "liver", "regions": ["abdomen"], "synonyms": forms, "lay": ["bile maker"]}]})
    )
    entry = Vocabulary.load(file)["liver"]
    assert entry.texts() == ["liver", "hepar", "bile maker"]
    assert entry.texts(kinds=["synonym"], splits=["val", "test"]) == ["iecur", "jecur"]
    train = Vocabulary.load(file).only(["train"])
    assert [c.entry.name for c in train.lookup("hepar")] == ["liver"]
    assert train.lookup("iecur") == []
    with pytest.raises(ModelError, match="no language split 'dev'"):
        train.only(["dev"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"nome": "liver"}, "has no name"),
        ({"name": "  "}, "has no name"),
        ("liver", "has no name"),
        ({"name": "liver", "synonym": []}, "unknown field 'synonym'.*Did you mean synonyms"),
        ({"name": "liver", "lay": [{"form": "x", "split": "dev"}]}, "neither a text nor a form"),
        ({"name": "liver", "lay": [{"form": "x", "weight": 2}]}, "neither a text nor a form"),
        ({"name": "liver", "lay": ["  "]}, "neither a text nor a form"),
        ({"name": "liver", "lay": "bile maker"}, "lay = bile maker; they are a list"),
        ({"name": "liver", "lay": [{"form": "x", "side": "left"}]}, "only a paired structure has forms of its left or right"),
        ({"name": "lung", "sides": True, "lay": [{"form": "x", "side": "up"}]}, "of the side 'up'"),
        ({"name": "liver", "lay": ["x"], "synonyms": ["x"]}, "has the form 'x' twice"),
        ({"name": "liver", "abbreviations": ["{S}L"]}, "needs 'sides'"),
        ({"name": "liver", "synonyms": ["segment {n}"]}, "need 'each'"),
        ({"name": "rib {n}", "each": [1, 2], "synonyms": ["rib {number}"]}, "need 'each'"),
        ({"name": "liver", "part_of": "torso"}, "part_of 'torso', which is no structure"),
        ({"name": "liver", "made_of": ["caudate lobe"]}, "made_of 'caudate lobe', which is no other structure"),
        ({"name": "liver", "made_of": ["liver"]}, "made_of 'liver', which is no other structure"),
        ({"name": "liver", "made_of": "lobes"}, "made_of = lobes; it is a list of names"),
        ({"name": "liver", "made_of": {"left": []}}, "by left, right and both"),
        ({"name": "lung", "sides": True, "made_of": ["lobe"]}, "by left, right and both"),
        ({"name": "lung", "sides": True, "made_of": {"top": ["lobe"]}}, "by left, right and both"),
        ({"name": "liver", "sides": "yes"}, "sides = 'yes'"),
        ({"name": "liver", "lies": "up"}, "lies on 'up'"),
        ({"name": "lung", "sides": True, "lies": "left"}, "a paired one has no 'lies'"),
        ({"name": "liver", "plural": "livers"}, "only a paired structure has one"),
        ({"name": "lung", "sides": True, "singular": "lung"}, "only an unpaired structure has one"),
        ({"name": "rib {n}", "each": [1, 13]}, "from 1 to 12"),
        ({"name": "liver", "regions": ["belly"]}, "'belly' among its regions"),
        ({"name": "liver", "regions": "abdomen"}, "they are a list of head"),
        ({"name": "liver", "modalities": ["US"]}, "'US' among its modalities"),
        ({"name": "liver", "cues": ["grey"]}, "lists of words by contrast"),
        ({"name": "liver", "cues": {"X-ray": ["grey"]}}, "cues for 'X-ray'"),
        ({"name": "liver", "cues": {"CT": "grey"}}, "they are a list of texts"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(tmp_path: Path, entry: Any, sentence: str) -> None:
    file = tmp_path / "vocabulary.json"
    file.write_text(json.dumps({"schema": 1, "entries": [entry]}))
    with pytest.raises(ModelError, match=sentence):
        Vocabulary.load(file)
    file.write_text(json.dumps({"schema": 1, "entries": [{"name": "liver"}, {"name": "liver"}]}))
    with pytest.raises(ModelError, match="two structures named 'liver'"):
        Vocabulary.load(file)
    with pytest.raises(ModelError, match="Did you mean"):
        VOCABULARY["lefd kidney"]


def test_a_dataset_adds_its_labels_and_takes_over_names() -> None:
    extended = VOCABULARY.extend(
        {
            "Anterior": LabelDescription("anterior hippocampus", ("uncal part",)),
            "L": LabelDescription("hepar", ("the big one",), "abdomen"),
            "gizmo_left": LabelDescription("left gizmo", laterality="left"),
        }
    )
    assert extended.lookup("Anterior")[0].entry.name == "anterior hippocampus"
    assert extended.lookup("uncal part")[0].entry.name == "anterior hippocampus"
    assert extended.lookup("liver")[0].entry.name == "hepar", "a synonym made canonical stands for the whole entry"
    assert extended.lookup("gizmo left")[0].entry.name == "left gizmo"
    assert "left gizmo" not in VOCABULARY
    with pytest.raises(DatasetError, match="laterality 'up'"):
        VOCABULARY.extend({"x": LabelDescription("x", laterality="up")})


@given(st.text(max_size=60))
def test_no_text_breaks_the_reading_of_names(text: str) -> None:
    assert all(word == fold(word) for word in words(text))
    VOCABULARY.lookup(text)
    VOCABULARY.resolve(text)


def test_plurals() -> None:
    pairs = {
        "kidneys": "kidney",
        "vertebrae": "vertebra",
        "ovaries": "ovary",
        "pancreas": "pancreas",
        "pelvis": "pelvis",
        "pons": "pons",
        "masses": "mass",
    }
    assert {plural: singular(plural) for plural in pairs} == pairs


def test_loading_is_quick_and_light() -> None:
    code = (
        "import sys, time; import seerseg.vocabulary as v; t = time.process_time(); v.Vocabulary.load(); "
        "print(time.process_time() - t, *[m for m in ('numpy', 'torch') if m in sys.modules])"
    )
    seconds, *heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert heavy == []
    assert float(seconds) < 0.3, "about 0.03 s on an idle core"


# Language splits. The rules are written anew here, on the raw file, so that the loader cannot hide a breach.
RAW: dict[str, Any] = json.loads(DEFAULT_FILE.read_text(encoding="utf-8"))
FORM_FIELDS = ("synonyms", "abbreviations", "lay", "descriptions", "relations")


def filled(text: str) -> str:
    """A template of the file as a text."""
    for mark, value in (("{S}", "L"), ("{nth}", "1st"), ("{n}", "1"), ("{ordinal}", "first"), ("{roman}", "I")):
        text = text.replace(mark, value)
    return text


def normal(text: str) -> tuple[str, ...]:
    """Words of a form without case, side words and plural; numbers and sides of a template filled in."""
    bare = tuple(singular(w) for w in words(filled(text)) if w not in RAW["side_words"])
    return bare or tuple(words(filled(text)))


def holds(longer: tuple[str, ...], shorter: tuple[str, ...]) -> bool:
    return any(longer[i : i + len(shorter)] == shorter for i in range(len(longer) - len(shorter) + 1))


def split_forms(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """(form, split) of every surface of a raw entry that is no canonical name."""
    listed = [form for name in FORM_FIELDS for form in raw.get(name, ())]
    return [(form, "train") if isinstance(form, str) else (form["form"], form.get("split", "train")) for form in listed]


def breaches(entries: list[dict[str, Any]], shipped: set[tuple[str, ...]]) -> list[str]:
    """What breaks the rules of the language splits, one sentence each; shipped: normal forms the shipped weights were trained on."""
    found: list[str] = []
    names = {raw["name"]: [raw[k] for k in ("name", "plural", "singular") if k in raw] for raw in entries}
    train = {normal(n) for shared in names.values() for n in shared} | {
        normal(f) for r in entries for f, s in split_forms(r) if s == "train"
    }
    held: dict[tuple[str, ...], str] = {}
    for raw in entries:
        forms = split_forms(raw)
        counts = {split: sum(s == split for _, s in forms) for split in ("train", "val", "test")}
        if (len(forms) >= 4 and not counts["test"]) or (len(forms) >= 5 and not counts["val"]):
            found.append(f"{raw['name']}: {len(forms)} forms, {counts}")
        told = [*names[raw["name"]], *(form for form, split in forms if split == "train")]
        own, roots = [normal(text) for text in told], {VOCABULARY.key(filled(text))[0] for text in told}
        for form, split in forms:
            if split == "train":
                continue
            key = normal(form)
            if any(holds(other, key) for other in own):
                found.append(f"{raw['name']}: {split} form {form!r} stands in a training form")
            elif VOCABULARY.key(filled(form))[0] in roots:
                found.append(f"{raw['name']}: {split} form {form!r} has the very roots of a training form")
            if key in train:
                found.append(f"{raw['name']}: {split} form {form!r} is a training form of another structure")
            if key in shipped:
                found.append(f"{raw['name']}: {split} form {form!r} is one that the shipped segmenter was trained on")
            if held.setdefault(key, split) != split:
                found.append(f"{raw['name']}: {form!r} is in val and in test")
    return found


def shipped_forms() -> set[tuple[str, ...]]:
    return {normal(form) for name, forms in nano_vocabulary._FORMS.items() for form in (name, *forms)}


def test_no_held_out_form_was_ever_in_training() -> None:
    assert breaches(RAW["entries"], shipped_forms()) == []


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"name": "liver", "synonyms": ["a", "b", "c", "d"]}, "4 forms"),
        ({"name": "liver", "synonyms": ["a", "b", "c", "d", {"form": "e", "split": "test"}]}, "5 forms"),
        ({"name": "liver", "synonyms": ["Big Hepars of it", {"form": "the left hepar", "split": "test"}]}, None),
        ({"name": "liver", "synonyms": ["big Hepars of it", {"form": "left hepar", "split": "test"}]}, "stands in a training form"),
        ({"name": "liver", "lay": ["hepatic tumour edge", {"form": "edge of the liver tumor", "split": "val"}]}, "the very roots"),
        ({"name": "spleen", "lay": [{"form": "LIVERS", "split": "val"}]}, "training form of another structure"),
        ({"name": "spleen", "lay": [{"form": "Liens", "split": "val"}]}, "shipped segmenter was trained on"),
        ({"name": "spleen", "lay": [{"form": "x y", "split": "val"}, {"form": "X Y", "split": "test"}]}, "in val and in test"),
    ],
)
def test_the_check_of_splits_sees_each_breach(entry: dict[str, Any], sentence: str | None) -> None:
    found = breaches([entry, {"name": "liver"}] if entry["name"] != "liver" else [entry], shipped_forms())
    assert (found == []) if sentence is None else (sentence in found[0])


def test_each_split_has_its_share_of_the_language() -> None:
    splits = [split for raw in RAW["entries"] for _, split in split_forms(raw)]
    shares = [splits.count(split) / len(splits) for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.60, 0.12, 0.28], abs=0.03)


@pytest.mark.parametrize("name", ["anterior hippocampus", "posterior hippocampus", "hippocampus"])
def test_the_hippocampus_has_a_rich_language_in_every_split(name: str) -> None:
    entry = VOCABULARY[name] if name in VOCABULARY else VOCABULARY["left hippocampus"]
    counts = [len(entry.texts(splits=[split])) for split in ("train", "val", "test")]
    assert all(count >= least for count, least in zip(counts, (12, 3, 5), strict=True)), counts


def test_training_words_alone_still_know_every_structure() -> None:
    assert TRAIN.names == VOCABULARY.names
    assert {s.split for entry in TRAIN for s in entry.surfaces if s.kind != "name"} == {"train"}
    assert TRAIN.resolve("hippocampal head") == TRAIN["anterior hippocampus"]
    assert TRAIN.lookup("rostral hippocampus") == []
    assert VOCABULARY.lookup("rostral hippocampus")[0].entry.name == "anterior hippocampus"

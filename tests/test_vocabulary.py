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
from seerseg.vocabulary import DEFAULT_FILE, LabelDescription, Vocabulary, fold, singular, words

VOCABULARY = Vocabulary.load()

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


def test_an_abbreviation_keeps_all_it_can_mean() -> None:
    meant = {candidate.entry.base for candidate in VOCABULARY.lookup("LV")}
    assert {"heart left ventricle", "lateral ventricle"} <= meant
    assert {"portal vein", "pulmonary vein"} <= {c.entry.base for c in VOCABULARY.lookup("PV")}


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
        ({"name": "liver", "synonym": []}, "unknown field 'synonym'.*Did you mean synonyms"),
        ({"name": "liver", "lay": [{"form": "x", "split": "dev"}]}, "neither a text nor a form"),
        ({"name": "liver", "part_of": "torso"}, "part_of 'torso', which is no structure"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(tmp_path: Path, entry: dict[str, Any], sentence: str) -> None:
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

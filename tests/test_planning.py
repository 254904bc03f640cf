"""Planning: records and fingerprints are right, values follow from data alone, edits are kept, faults are sentences."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raw_datasets as rd
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from seerseg.dataset import open_dataset
from seerseg.errors import DatasetError, PlanError
from seerseg.planning import (
    CaseRecord,
    Fingerprint,
    Gpu,
    Hardware,
    Spread,
    case_record,
    fingerprint,
    label_values,
    layout_of,
    load_fingerprint,
    load_plans,
    make_plans,
    purpose_of,
    save_fingerprint,
    save_plans,
    scan_headers,
    summarise,
    viewing_plane,
)
from seerseg.store import StoreLayout
from seerseg.views import ViewSpec
from seerseg.volume import read_case, read_labels

GIB = 1 << 30
LAPTOP = Hardware(4, 8 * GIB)
MACHINES = [
    LAPTOP,
    Hardware(1, GIB),
    Hardware(16, 64 * GIB, (Gpu("T4", 15 * GIB, (7, 5)),)),
    Hardware(16, 64 * GIB, (Gpu("A10", 23 * GIB, (8, 6)),)),
    Hardware(32, 256 * GIB, (Gpu("L40", 45 * GIB, (8, 9)),) * 3),
    Hardware(64, 512 * GIB, (Gpu("A100", 80 * GIB, (8, 0)),) * 8),
    Hardware(64, 512 * GIB, (Gpu("H200", 140 * GIB, (9, 0)),) * 2),
]


@given(labels=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.integers(0, 5)))
def test_label_values_are_counts_and_extents(labels: Any) -> None:
    found = label_values(labels)
    assert set(found) == set(np.unique(labels).tolist()) - {0}
    for value, record in found.items():
        where = np.argwhere(labels == value)
        assert record.voxels == len(where)
        assert record.lo == tuple(where.min(axis=0))
        assert record.hi == tuple(where.max(axis=0) + 1)


@pytest.mark.parametrize("values", [(-3, 7), (1, 70_000)])
def test_label_values_that_are_negative_or_large(values: tuple[int, int]) -> None:
    labels = np.zeros((4, 5, 6), np.int32)
    labels[1:3, 2, 3:5], labels[0, 0, 0] = values
    found = label_values(labels)
    assert set(found) == set(values)
    assert (found[values[0]].voxels, found[values[0]].lo, found[values[0]].hi) == (4, (1, 2, 3), (3, 3, 5))


def toy(folder: Path, **settings: Any) -> Fingerprint:
    return fingerprint(open_dataset(rd.make(folder, **settings)))


def test_a_record_says_what_is_in_the_files(tmp_path: Path) -> None:
    affine = np.array([[-1.0, 0, 0, 11], [0, 0, 2, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])  # stored LSA
    folder = rd.make(tmp_path, ["one"], affine=affine)
    volumes = read_case([folder / "imagesTr" / "one_0000.nii.gz"], modalities=["MR"])
    labels, _ = read_labels(folder / "labelsTr" / "one.nii.gz", volumes[0].grid)
    record = case_record("one", volumes, labels)
    assert record.orientation == "LSA"
    assert record.shape_zyx == (14, 10, 12)
    assert record.spacing_zyx == (1.0, 2.0, 1.0)
    assert (record.voxel_volume_mm3, record.oblique_deg, record.sheared, record.laterality) == (2.0, 0.0, False, "known")
    assert record.values is not None
    assert {v: r.voxels for v, r in record.values.items()} == {1: 48, 2: 140}
    assert (record.channels[0].dtype, record.channels[0].modality) == ("int16", "MR")
    assert record.channels[0].percentiles["max"] == rd.scan(0).max()
    assert CaseRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_oblique_and_sheared_grids_are_told(tmp_path: Path) -> None:
    angle = np.deg2rad(12)
    turned = np.diag([1.0, 1, 2, 1])
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    sheared = np.diag([1.0, 1, 2, 1])
    sheared[0, 1] = 0.2
    for name, affine, expected in (("a", turned, (12.0, False)), ("b", sheared, (11.31, True))):
        rd.write(tmp_path / f"{name}.nii.gz", rd.scan(1), affine, codes=(1, 0))
        record = case_record(name, read_case([tmp_path / f"{name}.nii.gz"]), None)
        assert (pytest.approx(record.oblique_deg, abs=0.1), record.sheared) == expected
        assert record.values is None


def test_the_fingerprint_of_a_toy(tmp_path: Path) -> None:
    words = [("r1", "case_1", "the liver pls", "liver"), ("r2", "case_1", "LIVER left lobe too", "liver"), ("r3", "case_2", "spleen", None)]
    requests = [{"id": i, "case": c, "text": t, "target": target, "style": "messy"} for i, c, t, target in words]
    found = toy(tmp_path, requests=[*requests, {"id": "r4", "case": "case_3", "text": "what"}])
    assert (found.cases, found.labelled, found.subjects) == (3, 3, 3)
    assert [s.median for s in found.shape_zyx] == [10, 14, 12]
    assert [s.median for s in found.spacing_zyx] == [2, 1, 1]
    liver = found.targets["liver"]
    assert liver.cases == 3
    assert liver.volume_ml is not None
    assert liver.volume_ml.median == pytest.approx(48 * 2 / 1000)
    assert liver.slices_zyx == (3.0, 4.0, 4.0)
    assert liver.border == 0
    asked = found.requests
    assert (asked.count, asked.cases, asked.sets, asked.unknown_truth, asked.named_side) == (4, 3, 2, 1, 1)
    assert asked.targets == {"liver": 2, "absent": 1}
    assert asked.styles == {"messy": 3}
    path = tmp_path / "out" / "fingerprint.json"
    save_fingerprint(found, path)
    assert load_fingerprint(path) == found


def test_regions_are_unions(tmp_path: Path) -> None:
    found = toy(tmp_path, labels={"background": 0, "whole": [1, 2], "part": 2, "never": 3})
    assert found.targets["whole"].volume_ml == Spread.of([(48 + 140) * 2 / 1000])
    assert found.targets["whole"].slices_zyx == (8.0, 8.0, 8.0)
    assert (found.targets["never"].cases, found.targets["never"].volume_ml) == (0, None)


def test_workers_and_order_change_nothing(tmp_path: Path) -> None:
    dataset = open_dataset(rd.make(tmp_path, channels=("CT",)))
    one = fingerprint(dataset, 1)
    assert fingerprint(dataset, 2) == one
    records = [
        case_record(c.id, read_case(c.images, modalities=dataset.modalities, name=c.id), read_labels(c.label)[0])  # type: ignore[arg-type]
        for c in dataset.cases.values()
    ]
    assert summarise(dataset, records[::-1]) == one


def test_one_bad_case_does_not_end_it_but_all_bad_ones_do(tmp_path: Path) -> None:
    folder = rd.make(tmp_path)
    (folder / "imagesTr" / "case_2_0000.nii.gz").write_bytes(b"no image")
    dataset = open_dataset(folder)
    found = fingerprint(dataset)
    assert found.cases == 2
    assert list(found.failed) == ["case_2"]
    assert scan_headers(dataset).cases == 3
    for name in ("case_1", "case_3"):
        (folder / "imagesTr" / f"{name}_0000.nii.gz").write_bytes(b"no image")
    for measure in (fingerprint, scan_headers):
        with pytest.raises(DatasetError, match=r"No case of .* can be read"):
            measure(dataset)


@pytest.mark.parametrize("data", ["{}", '{"schema": 1}', '{"schema": 1, "shape_zyx": 3}', "[]", "{", '{"schema": 2}'])
def test_a_damaged_fingerprint_is_a_sentence(tmp_path: Path, data: str) -> None:
    (tmp_path / "f.json").write_text(data)
    with pytest.raises(PlanError, match=r"f\.json"):
        load_fingerprint(tmp_path / "f.json")


# --- rules


@pytest.mark.parametrize(
    ("spacing", "plane"),
    [
        ((1, 1, 1), "axial"),
        ((5, 0.5, 0.5), "axial"),
        ((0.5, 5, 0.5), "coronal"),
        ((0.5, 0.5, 3), "sagittal"),
        ((1, 1.4, 1), "axial"),
        ((2, 3, 1), "coronal"),
    ],
)
def test_the_plane_is_that_of_finest_resolution(spacing: tuple[float, float, float], plane: str) -> None:
    assert viewing_plane(spacing) == plane


@pytest.mark.parametrize(
    ("target", "purpose"),
    [
        ("left lung", "lung"),
        ("left_upper_lung_lobe", "lung"),
        ("hip_left", "bone"),
        ("rib 4", "bone"),
        ("L1 vertebra", "bone"),
        ("hip", "bone"),
        ("liver tumour", "liver"),
        ("kidney", "soft_tissue"),
        ("tribe", "soft_tissue"),
        ("whipple", "soft_tissue"),
    ],
)
def test_purposes(target: str, purpose: str) -> None:
    assert purpose_of(target) == purpose


def resized(found: Fingerprint, shape: tuple[int, int, int], spacing: tuple[float, float, float], **changes: Any) -> Fingerprint:
    return dataclasses.replace(
        found,
        shape_zyx=tuple(Spread.of([n]) for n in shape),
        spacing_zyx=tuple(Spread.of([s]) for s in spacing),
        voxels=Spread.of([float(np.prod(shape))]),
        **changes,
    )


@pytest.fixture(scope="module")
def mr(tmp_path_factory: pytest.TempPathFactory) -> Fingerprint:
    return toy(tmp_path_factory.mktemp("mr"))


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Fingerprint:
    return toy(tmp_path_factory.mktemp("ct"), channels=("CT",))


def test_a_large_scan_gets_the_views_of_seer(mr: Fingerprint) -> None:
    plans = make_plans(resized(mr, (155, 240, 240), (1.0, 1.0, 1.0)), LAPTOP)
    assert plans.view_spec() == ViewSpec(plane="axial", count=8, size_px=448, lo=0.10, hi=0.90, window="volume")
    assert plans.value("tokens.per_slice") == 196
    assert plans.value("tokens.images") == 1568
    assert plans.value("tokens.budget") >= 1568 + 256 + 256 + plans.value("tokens.prompt")


def test_small_crops_and_few_slices(mr: Fingerprint) -> None:
    views = make_plans(resized(mr, (6, 50, 40), (4.0, 1.0, 1.0)), LAPTOP).view_spec()
    assert (views.count, views.size_px) == (5, 224)  # slices 0 (round 0.5) to 4 (round 4.5)
    coronal = make_plans(resized(mr, (200, 20, 180), (0.9, 6.0, 0.9)), LAPTOP)
    assert coronal.view_spec().plane == "coronal"
    assert StoreLayout(**coronal.store_layout).axis == 1


def test_ct_windows_follow_the_targets(ct: Fingerprint, mr: Fingerprint) -> None:
    def shown(found: Fingerprint, *targets: str) -> Any:
        target = next(iter(found.targets.values()))
        return make_plans(dataclasses.replace(found, targets=dict.fromkeys(targets, target)), LAPTOP).view_spec().window

    assert shown(ct, "left lung", "right lung") == (-600.0, 1500.0)
    assert shown(ct, "kidney", "spleen") == (40.0, 400.0)
    assert shown(ct, "rib", "lung") == (0.0, 2000.0)
    assert shown(mr, "left lung") == "volume"


def test_ct_that_is_no_ct_is_shown_by_percentiles(tmp_path: Path) -> None:
    folder = rd.make(tmp_path, channels=("CT",))
    for path in (folder / "imagesTr").iterdir():
        rd.write(path, rd.scan(3) + 5)  # nothing below -50
    plans = make_plans(fingerprint(open_dataset(folder)), LAPTOP)
    assert plans.value("channel.0.hounsfield") is False
    assert plans.mathematics["channel.0.hounsfield"].inputs["implausible"] == "3 of 3 cases"
    assert plans.view_spec().window == "volume"


@pytest.mark.parametrize(("requests", "rank"), [(100, 16), (1780, 16), (1800, 32), (17_000, 32), (20_000, 64)])
def test_lora_rank_by_training_pairs(mr: Fingerprint, requests: int, rank: int) -> None:
    asked = dataclasses.replace(mr.requests, count=requests, set_size=Spread.of([6.0]))
    plans = make_plans(dataclasses.replace(mr, requests=asked), LAPTOP)
    assert (plans.value("lora.rank"), plans.value("lora.alpha")) == (rank, 2 * rank)


def test_nsd_tolerances(mr: Fingerprint) -> None:
    def tolerance(ml: float, spacing: tuple[float, float, float]) -> float:
        target = dataclasses.replace(mr.targets["liver"], volume_ml=Spread.of([ml]))
        found = resized(mr, (100, 200, 200), spacing, targets={"it": target})
        return float(make_plans(found, LAPTOP).value("evaluation.nsd_tolerance_mm")["it"])

    assert tolerance(1.7, (1, 1, 1)) == 1.0  # hippocampus: 1 mm as the Decathlon has it
    assert tolerance(200, (3, 0.8, 0.8)) == 3.0  # spleen: 3 mm as the Decathlon has it
    assert tolerance(1500, (3, 0.8, 0.8)) == 5.0
    assert tolerance(1.7, (6, 2.2, 2.2)) == 2.2  # never below what a voxel can tell
    assert tolerance(0.001, (1, 0.4, 0.4)) == 1.0


# --- hardware changes speed, never the mathematics


def test_the_machine_never_changes_the_mathematics(mr: Fingerprint, ct: Fingerprint) -> None:
    for found in (mr, ct, resized(mr, (300, 512, 512), (1.0, 0.7, 0.7))):
        made = [make_plans(found, machine) for machine in MACHINES]
        assert len({json.dumps(plans.to_json()["mathematics"], sort_keys=True) for plans in made}) == 1
        assert len({plans.identity for plans in made}) == 1
        assert len({json.dumps(plans.to_json()["computing"], sort_keys=True) for plans in made}) > 3
        for plans in made:
            for stage in ("sft", "grpo"):
                steps = (plans.value("device.gpus"), plans.value(f"{stage}.micro_batch"), plans.value(f"{stage}.accumulation"))
                assert np.prod(steps) == plans.value(f"{stage}.batch")


@given(
    batches=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    gpus=st.lists(st.sampled_from([11, 16, 24, 48, 80, 141]), max_size=9),
    cpus=st.integers(1, 256),
    ram=st.integers(1, 2000),
)
def test_any_batch_is_kept_on_any_machine(mr: Fingerprint, batches: tuple[int, int], gpus: list[int], cpus: int, ram: int) -> None:
    made = make_plans(mr, LAPTOP)
    edited = {"sft.batch": batches[0], "grpo.sets_per_update": batches[1]}
    for name, value in edited.items():
        made.mathematics[name] = dataclasses.replace(made.mathematics[name], value=value)
    machine = Hardware(cpus, ram * GIB, tuple(Gpu("x", g * GIB, (8, 0)) for g in gpus))
    plans = make_plans(mr, machine, previous=made)
    assert plans.value("grpo.batch") == 8 * batches[1]
    for stage in ("sft", "grpo"):
        parts = [plans.value("device.gpus"), plans.value(f"{stage}.micro_batch"), plans.value(f"{stage}.accumulation")]
        assert np.prod(parts) == plans.value(f"{stage}.batch")
    assert 1 <= plans.value("workers.read") <= min(cpus, 8)
    assert plans.value("device.gpus") <= max(1, len(gpus))


@pytest.mark.parametrize(
    ("gib", "preset", "quantize", "checkpointing"),
    [
        (11, "16G", "4bit", True),
        (15, "16G", "4bit", True),
        (23, "24G", "4bit", True),
        (47, "48G", "none", True),
        (79, "80G", "none", False),
        (140, "141G", "none", False),
    ],
)
def test_presets(mr: Fingerprint, gib: int, preset: str, quantize: str, checkpointing: bool) -> None:
    plans = make_plans(mr, Hardware(8, 64 * GIB, (Gpu("x", gib * GIB, (8, 0)),)))
    found = [plans.value(f"device.{name}") for name in ("preset", "quantize", "checkpointing", "precision")]
    assert found == [preset, quantize, checkpointing, "bfloat16"]


def test_the_smallest_gpu_decides_and_old_ones_get_float16(mr: Fingerprint) -> None:
    plans = make_plans(mr, Hardware(8, 64 * GIB, (Gpu("V100", 32 * GIB, (7, 0)), Gpu("A100", 80 * GIB, (8, 0)))))
    assert (plans.value("device.preset"), plans.value("device.precision"), plans.value("device.gpus")) == ("24G", "float16", 2)
    assert make_plans(mr, LAPTOP).value("device.precision") == "float32"


def test_plans_move_to_another_machine(mr: Fingerprint, tmp_path: Path) -> None:
    plans = load_plans(save_plans(make_plans(mr, MACHINES[5]), tmp_path))
    moved = plans.on(LAPTOP)
    assert moved.identity == plans.identity
    assert moved.value("device.preset") == "cpu"
    assert moved.to_json()["computing"] == make_plans(mr, LAPTOP).to_json()["computing"]


# --- the file


def edit(path: Path, **values: Any) -> Path:
    content = json.loads(path.read_text())
    for name, value in values.items():
        name = name.replace("__", ".")
        part = next(p for p in ("mathematics", "computing") if name in content[p])
        content[part][name]["value"] = value
    path.write_text(json.dumps(content))
    return path


def test_round_trip(mr: Fingerprint, tmp_path: Path) -> None:
    plans = make_plans(mr, MACHINES[4], "mine")
    path = save_plans(plans, tmp_path)
    assert path.name == "mine.json"
    assert load_plans(path).to_json() == plans.to_json()
    assert load_plans(path).identity == plans.identity


def test_edits_are_kept_and_followed(mr: Fingerprint, tmp_path: Path) -> None:
    path = edit(save_plans(make_plans(mr, LAPTOP), tmp_path), views__count=4, paraphrases__count=8, workers__read=3)
    with pytest.raises(PlanError, match=r"grpo\.group is 8, but paraphrases.count times grpo.samples is 16"):
        load_plans(path)
    again = make_plans(mr, MACHINES[5], previous=load_plans(path, complete=False))
    assert again.value("views.count") == 4
    assert again.view_spec().count == 4
    assert again.mathematics["views.count"].planned == 8
    assert again.mathematics["views.count"].edited
    assert (again.value("grpo.group"), again.value("grpo.batch")) == (16, 128)
    assert len(again.value("paraphrases.styles")) == 7  # there are no more
    assert again.value("tokens.images") == 4 * 49
    assert again.value("workers.read") == 3
    assert again.identity != make_plans(mr, LAPTOP).identity
    assert "4 (edited, the" in again.explain()
    third = make_plans(mr, LAPTOP, previous=load_plans(save_plans(again, tmp_path)))
    assert third.to_json()["mathematics"] == again.to_json()["mathematics"]


def test_the_layout_known_from_headers_is_the_one_planned(tmp_path: Path) -> None:
    dataset = open_dataset(rd.make(tmp_path, affine=np.diag([1.0, 6.0, 1.0, 1.0])))
    scan = scan_headers(dataset)
    plans = make_plans(fingerprint(dataset), LAPTOP)
    assert layout_of(scan) == plans.store_layout == {"axis": 1, "slab": 2, "chunk_bytes": 131072}
    path = edit(save_plans(plans, tmp_path), views__plane="axial")
    edited = load_plans(path, complete=False)
    assert (
        layout_of(scan, edited)
        == make_plans(fingerprint(dataset), LAPTOP, previous=edited).store_layout
        == {"axis": 0, "slab": 2, "chunk_bytes": 131072}
    )


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("views.plane", "diagonal", "must be one of axial, coronal, sagittal"),
        ("views.count", 0, "must be a whole number from 1"),
        ("views.count", 8.5, "must be a whole number from 1"),
        ("views.lo", True, "must be a number from 0 to 1"),
        ("views.lo", 0.95, "views.lo is 0.95, above views.hi 0.9"),
        ("views.window", [40, -5], "centre, width"),
        ("views.window", "lung", "centre, width"),
        ("views.channel", 3, "the dataset has 1 channel"),
        ("channel.0.windows", {"lung": 5}, "names with"),
        ("grpo.lambda", 0.9, "must be a number from 0 to 0.5"),
        ("grpo.batch", 63, "grpo.batch is 63, but grpo.group times grpo.sets_per_update is 64"),
        ("sft.accumulation", 3, "sft.batch is 8, but device.gpus times sft.micro_batch times sft.accumulation is 3"),
        ("device.checkpointing", 1, "must be one of True, False"),
        ("store.axis", True, "must be one of 0, 1, 2"),
        ("evaluation.nsd_tolerance_mm", {"liver": 0}, "millimetres above 0"),
    ],
)
def test_edits_that_are_not_allowed(mr: Fingerprint, tmp_path: Path, name: str, value: Any, sentence: str) -> None:
    path = edit(save_plans(make_plans(mr, LAPTOP), tmp_path), **{name.replace(".", "__"): value})
    with pytest.raises(PlanError, match=r"plans\.json") as caught:
        load_plans(path)
    assert sentence in str(caught.value)


def test_misspelt_names_get_a_suggestion(mr: Fingerprint, tmp_path: Path) -> None:
    plans = make_plans(mr, LAPTOP)
    with pytest.raises(PlanError, match=r"Did you mean .*views\.count"):
        plans.value("view.count")
    content = plans.to_json()
    for part, key, sentence in (
        ("mathematics", "views.cuont", r"unknown value 'views.cuont'\. Did you mean views\.count"),
        (None, "overide", "unknown key 'overide'"),
    ):
        spoilt = json.loads(json.dumps(content))
        (spoilt[part] if part else spoilt)[key] = {"value": 4}
        (tmp_path / "p.json").write_text(json.dumps(spoilt))
        with pytest.raises(PlanError, match=sentence):
            load_plans(tmp_path / "p.json")
    del content["mathematics"]["views.lo"]
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"lacks 'views\.lo'\. Run seerseg_plan again"):
        load_plans(tmp_path / "p.json")
    assert make_plans(mr, LAPTOP, previous=load_plans(tmp_path / "p.json", complete=False)).value("views.lo") == 0.1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_any_damage_is_a_sentence_or_harmless(mr: Fingerprint, tmp_path: Path, data: st.DataObject) -> None:
    content = make_plans(mr, LAPTOP).to_json()
    part = data.draw(st.sampled_from([*content, "mathematics", "computing"]))
    if isinstance(content[part], dict) and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(content[part])))
        if isinstance(content[part][key], dict) and data.draw(st.booleans()):
            content[part][key] = {**content[part][key], data.draw(st.sampled_from(["value", "inputs", "rule"])): data.draw(json_values)}
        else:
            content[part][key] = data.draw(json_values)
    else:
        content[part] = data.draw(json_values)
    (tmp_path / "p.json").write_text(json.dumps(content))
    try:
        plans = load_plans(tmp_path / "p.json")
    except PlanError as error:
        message = str(error)
    else:
        message = plans.explain()
        plans.view_spec()
        plans.on(MACHINES[3])
    assert message


# --- what a person reads


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_explanation_fits_and_leaves_nothing_out(ct: Fingerprint, width: int) -> None:
    plans = make_plans(ct, MACHINES[4])
    text = plans.explain(width)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    for name, planned in plans.values.items():
        assert f"\n{name} " in text
        assert planned.rule.split()[0] in flat
    assert "[gpus L40, L40, L40" in flat


def test_long_lists_are_cut_in_the_explanation(ct: Fingerprint) -> None:
    target = ct.targets["liver"]
    plans = make_plans(dataclasses.replace(ct, targets={f"part{n}": target for n in range(59)}), LAPTOP)
    flat = " ".join(plans.explain().split())
    assert "part7: 1" in flat
    assert "part8: 1" not in flat
    assert "(59 in all" in flat


def test_every_value_has_a_rule_and_inputs_are_json(ct: Fingerprint, mr: Fingerprint) -> None:
    for plans in (make_plans(ct, MACHINES[6]), make_plans(mr, LAPTOP)):
        for name, planned in plans.values.items():
            assert len(planned.rule) > 4, name
            assert json.loads(json.dumps(planned.inputs)) == planned.inputs, name
            assert not planned.edited


@pytest.mark.slow
def test_the_hippocampus_plans(development_data: Path) -> None:
    found = fingerprint(open_dataset(development_data / "mr_hippocampus"), 2)
    plans = make_plans(found, LAPTOP)
    assert (found.cases, found.subjects, found.failed) == (199, 129, {})
    assert plans.view_spec() == ViewSpec(plane="axial", count=8, size_px=224, lo=0.10, hi=0.90, window="volume")
    assert plans.value("evaluation.nsd_tolerance_mm") == {"anterior hippocampus": 1.0, "posterior hippocampus": 1.0}

"""Predictions on disk against references on disk: rows, stability, absent targets, what is left out, what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seerseg.dataset import Request, label_prompts, open_dataset, write_requests
from seerseg.errors import DatasetError, NothingToDoError, OutputError, SeerSegError, UsageError
from seerseg.evaluation import References, Scoring, evaluate, evaluate_label_maps, summarise, text_table, write_csv
from seerseg.evaluation.records import About, Row
from seerseg.metrics import MaskScores
from seerseg.paths import write_json

SHAPE = (14, 16, 18)  # x, y, z as stored
ODDITIES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70_000), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
    st.sampled_from(["ok", "absent", "a.nii.gz", "..", "/", "lay left", "a.json"]),
)  # fmt: skip
STYLES = ("formal", "lay", "typo")


def affine(kind="straight"):
    out = np.diag([1.0, 1.0, 2.0, 1.0])
    out[:3, 3] = (-7, -8, -18)
    if kind == "sheared":
        out[0, 1] = 0.6
    if kind == "oblique":
        c, s = np.cos(0.4), np.sin(0.4)
        out[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ out[:3, :3]
    return out


def save(path, array_xyz, matrix, codes="RAS"):
    """Write a label map given in RAS array order, stored with other axis codes and equal in the world."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array_xyz.astype(np.uint8), matrix)
    wanted = nib.orientations.axcodes2ornt(codes)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(matrix), wanted))
    nib.save(image, path)


def labels_of(shift=0):
    array = np.zeros(SHAPE, np.uint8)
    array[1:6, 3:10, 3 + shift : 9 + shift] = 1
    array[8:13, 3:10, 3 + shift : 9 + shift] = 2
    return array


def write_prediction(folder, case, entries, label_map=None, matrix=None, codes="RAS", model=None):
    requests = []
    for entry in entries:
        base = {"status": "ok", "value": None, "file": None, "target_answered": None, "style": "", "seconds": 0.5}
        requests.append({**base, **entry})
    if label_map is not None:
        save(folder / f"{case}.nii.gz", label_map, affine() if matrix is None else matrix, codes)
    model = model or {"reasoner": "scripted", "segmenter": "scripted", "protocol": "seer", "bank_mode": "frozen", "seed": 0}
    write_json(folder / f"{case}.json", {"schema": 1, "case": case, "model": model, "legend": {}, "overlaps": [], "requests": requests})


@pytest.fixture
def raw(tmp_path) -> Path:
    """Four cases of two subjects, on straight, sheared and oblique grids; case d has no right lung."""
    folder = tmp_path / "raw" / "Dataset009_Boxes"
    kinds = {"a": "straight", "b": "sheared", "c": "oblique", "d": "straight"}
    requests = []
    for case, kind in kinds.items():
        array = labels_of()
        if case == "d":
            array[array == 2] = 0
        save(folder / "imagesTr" / f"{case}_0000.nii.gz", array * 50, affine(kind))
        save(folder / "labelsTr" / f"{case}.nii.gz", array, affine(kind))
        for side in ("left", "right"):
            for style in STYLES:
                target = None if case == "d" and side == "right" else (f"{side} lung",)
                requests.append(
                    Request(f"{case}-{side}-{style}", case, f"{style} {side}", target, style, "test" if style == "typo" else "train")
                )
    write_requests(folder / "requests.jsonl", requests)
    write_json(folder / "subjects.json", {"one": ["a", "b"], "two": ["c", "d"]})
    write_json(
        folder / "dataset.json",
        {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "left lung": 1, "right lung": 2},
            "numTraining": 4,
            "file_ending": ".nii.gz",
        },
    )
    return folder


def predict_perfectly(raw, folder, *, label=True):
    dataset = open_dataset(raw)
    for case, files in dataset.cases.items():
        image = nib.load(files.label)
        array, matrix = np.asarray(image.dataobj), image.affine
        mine = [r for r in dataset.requests if r.case == case] + (label_prompts(dataset, [case]) if label else [])
        entries = []
        for r in mine:
            value = 1 if "left" in r.text else 2
            present = (array == value).any()
            status = {"status": "ok", "value": value, "target_answered": f"{r.text.split()[-1]} lung"} if present else {"status": "absent"}
            if present and r.style == "label_prompt":
                status["target_answered"] = r.text
            entries.append({"id": r.id, "text": r.text, **status})
        write_prediction(folder, case, entries, array, matrix)
    return dataset


class TestRequests:
    def test_perfect_predictions(self, raw, tmp_path):
        dataset = predict_perfectly(raw, tmp_path / "out")
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), dataset.requests, optional=label_prompts(dataset))
        free, label = found.summary("free text"), found.summary("label prompt")
        assert (free.dice.mean, free.dice.worst, free.dice.std, free.nsd.mean, free.hd95_mm.mean) == (1, 1, 0, 1, 0)
        assert (free.n, free.subjects, free.requests, free.paraphrases) == (7, 2, 21, (3, 3))
        assert label.n == 7  # the eighth is the right lung of d, which the reference does not hold
        assert free.answer_rate == 1.0
        assert found.absent.requests == 4
        assert found.absent.answered_absent == 4
        assert found.absent.false_positives == 0
        assert found.missing == found.faults == ()
        assert next(c for c in found.costs if not c.target).difference.mean == 0
        assert {g.name for g in found.languages} == {"train", "test"}
        assert [g.name for g in found.styles] == list(STYLES)
        assert found.about.bank_mode == "frozen"
        json.dumps(found.to_json(), allow_nan=False)

    def test_stability_by_hand(self, raw, tmp_path):
        """One paraphrase draws the whole, one half of it, one nothing: Dice 1, 2/3, 0."""
        dataset = open_dataset(raw)
        array = labels_of()
        left = array == 1
        half = left.copy()
        half[:, :, 6:] = False
        out = tmp_path / "out"
        ids = [f"a-left-{s}" for s in STYLES]
        save(out / "a__1.nii.gz", left, affine())
        save(out / "a__2.nii.gz", half, affine())
        write_prediction(
            out,
            "a",
            [
                {"id": ids[0], "text": "formal left", "file": "a__1.nii.gz", "value": 1, "target_answered": "left lung"},
                {"id": ids[1], "text": "lay left", "file": "a__2.nii.gz", "value": 7, "target_answered": "right lung"},
                {"id": ids[2], "text": "typo left", "status": "absent"},
            ],
        )
        requests = [r for r in dataset.requests if r.id in ids]
        found = evaluate(out, References.of_dataset(dataset), requests)
        (pair,) = found.case_targets
        values = [1.0, 2 / 3, 0.0]
        assert pair.dice.mean == pytest.approx(np.mean(values))
        assert pair.dice.worst == 0
        assert pair.dice.std == pytest.approx(np.std(values))
        assert pair.dice.variance == pytest.approx(np.var(values))
        assert (pair.failures, pair.answered_absent) == (1, 1)
        assert pair.hd95_mm.worst == pytest.approx(np.sqrt(14**2 + 16**2 + 36**2))
        summary = found.summary("free text")
        assert summary.answer_rate == pytest.approx(1 / 3)
        assert summary.dice.interval is None  # one subject
        rows = {r.request: r for r in found.rows}
        assert rows[ids[2]].failed
        assert rows[ids[0]].scores.reference_ml == pytest.approx(5 * 7 * 6 * 2 / 1000)

    def test_drawn_where_nothing_is(self, raw, tmp_path):
        dataset = open_dataset(raw)
        drawn = labels_of() * 0
        drawn[1:4, 1:4, 1:4] = 2
        entries = [{"id": f"d-right-{s}", "text": f"{s} right", "value": 2, "target_answered": "right lung"} for s in STYLES[:2]]
        entries.append({"id": "d-right-typo", "text": "typo right", "status": "absent"})
        write_prediction(tmp_path / "out", "d", entries, drawn)
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), [r for r in dataset.requests if r.id.startswith("d-right")])
        assert found.summaries == ()
        assert (found.absent.requests, found.absent.false_positives, found.absent.answered_absent) == (3, 2, 1)
        assert found.absent.false_ml == pytest.approx(2 * 27 * 2 / 1000 / 3)
        assert "drawn nevertheless: 2 (66.7%)" in text_table(found)

    @pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "SAL"])
    @pytest.mark.parametrize("case", ["a", "b", "c"])
    def test_a_prediction_stored_in_another_axis_order_is_scored_exactly(self, raw, tmp_path, case, codes):
        dataset = open_dataset(raw)
        image = nib.load(dataset.cases[case].label)
        array = np.asarray(image.dataobj)
        save(tmp_path / "out" / f"{case}__{case}-left-lay.nii.gz", array == 1, image.affine, codes)
        request = [r for r in dataset.requests if r.id == f"{case}-left-lay"]
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), request)
        assert found.rows[0].scores.dice == 1.0
        assert found.rows[0].status == "mask"

    def test_mirrored_in_the_world_is_not_excused(self, raw, tmp_path):
        dataset = open_dataset(raw)
        save(tmp_path / "out" / "a__a-left-lay.nii.gz", labels_of()[::-1] == 1, affine())
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), [r for r in dataset.requests if r.id == "a-left-lay"])
        assert found.rows[0].scores.dice == 0.0

    @pytest.mark.parametrize("change", ["moved", "cropped", "spaced"])
    def test_another_grid_is_a_fault_and_not_a_score(self, raw, tmp_path, change):
        dataset = open_dataset(raw)
        matrix, array = affine(), labels_of() == 1
        if change == "moved":
            matrix[0, 3] += 1.0
        elif change == "spaced":
            matrix[0, 0] = 1.1
        else:
            array = array[:-1]
        save(tmp_path / "out" / "a__a-left-lay.nii.gz", array, matrix)
        save(tmp_path / "out" / "a__a-left-typo.nii.gz", labels_of() == 1, affine())
        requests = [r for r in dataset.requests if r.id in ("a-left-lay", "a-left-typo")]
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), requests)
        assert len(found.faults) == 1
        assert "not on the grid of its reference" in found.faults[0]
        assert [r.scores is None for r in found.rows] == [True, False]
        assert found.summary("free text").requests == 1

    def test_a_union_of_labels(self, raw, tmp_path):
        dataset = open_dataset(raw)
        both = Request("both", "a", "both lungs", ("left lung", "right lung"))
        save(tmp_path / "out" / "a__both.nii.gz", labels_of() > 0, affine())
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), [both])
        assert found.rows[0].target == "left lung + right lung"
        assert found.rows[0].scores.dice == 1.0

    def test_ignored_voxels_count_neither_way(self, raw, tmp_path):
        array = labels_of()
        array[1:6, 3:10, 9:12] = 3
        save(raw / "labelsTr" / "a.nii.gz", array, affine())
        meta = json.loads((raw / "dataset.json").read_text())
        meta["labels"]["ignore"] = 3
        write_json(raw / "dataset.json", meta)
        dataset = open_dataset(raw)
        save(tmp_path / "out" / "a__a-left-lay.nii.gz", (array == 1) | (array == 3), affine())
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), [r for r in dataset.requests if r.id == "a-left-lay"])
        assert found.rows[0].scores.dice == 1.0

    def test_targets_cut_off_by_the_field_of_view_are_left_out(self, raw, tmp_path):
        dataset = predict_perfectly(raw, tmp_path / "out", label=False)
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), dataset.requests, scoring=Scoring(least_voxels=10_000))
        assert found.summaries == ()
        assert {r.truth for r in found.rows} == {"unknown", "absent"}

    def test_tolerances_per_target(self, raw, tmp_path):
        dataset = open_dataset(raw)
        moved = labels_of(shift=1)
        entries = [{"id": f"a-{side}-lay", "text": f"lay {side}", "value": v} for v, side in ((1, "left"), (2, "right"))]
        write_prediction(tmp_path / "out", "a", entries, moved)
        requests = [r for r in dataset.requests if r.id in ("a-left-lay", "a-right-lay")]
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), requests, scoring=Scoring(1.0, {"right lung": 2.0}))
        nsd = {r.target: r.scores.nsd for r in found.rows}
        assert nsd["right lung"] == 1.0
        assert nsd["left lung"] < 1.0

    def test_unknown_truth_is_in_no_number(self, raw, tmp_path):
        dataset = open_dataset(raw)
        write_prediction(tmp_path / "out", "a", [{"id": "q", "text": "what?", "value": 1}], labels_of())
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), [Request("q", "a", "what?", None, has_target=False)])
        assert found.summaries == ()
        assert found.absent is None
        assert found.rows[0].drawn_voxels == 5 * 7 * 6
        assert "without a known truth" in text_table(found)

    def test_workers_change_nothing(self, raw, tmp_path):
        dataset = predict_perfectly(raw, tmp_path / "out")
        (tmp_path / "out" / "b.nii.gz").write_bytes(b"no image")
        steps = []
        one, two = (
            evaluate(
                tmp_path / "out",
                References.of_dataset(dataset),
                dataset.requests,
                optional=label_prompts(dataset),
                workers=n,
                progress=lambda *s: steps.append(s),
            )
            for n in (1, 2)
        )
        assert one == two
        assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2
        assert len(one.faults) == 1

    def test_a_flat_image_has_no_millimetres(self, tmp_path):
        array = np.zeros((20, 20, 1), np.uint8)
        array[3:9, 3:9] = 1
        save(tmp_path / "gt" / "a.nii.gz", array, np.eye(4))
        save(tmp_path / "out" / "a.nii.gz", array, np.eye(4))
        found = evaluate_label_maps(tmp_path / "out", References.of_folder(tmp_path / "gt", {"spot": (1,)}))
        (summary, _) = found.summaries
        assert summary.dice.mean == 1.0
        assert summary.nsd is None
        assert summary.hd95_mm is None
        assert found.rows[0].drawn_ml is None
        assert " -" in text_table(found)


class TestWhatPredictionWrites:
    """The files of seerseg.prediction itself, of scans stored in four axis orders."""

    def test_label_maps_overlaps_and_absent_targets(self, tmp_path):
        from prediction_cases import NAMES, make_folder
        from prediction_cases import labels_of as truth_of

        from seerseg.prediction import Predictor, predict_folder
        from seerseg.reasoners.scripted import ScriptedReasoner

        def verbatim(dialogue, sample):
            words = dialogue[-1].text.split("<raw_prompt>")[-1].split("</raw_prompt>")[0]
            return f"<evidence>e</evidence><rationale>r</rationale><answer>{words}</answer>"

        images = make_folder(tmp_path)
        files = {f"case{i}": truth_of(images / f"case{i}_0000.nii.gz") for i in range(4)}
        labels = {"liver": (1,), "spleen": (2,), "left kidney": (3,), "aorta": (4,), "trunk": (1, 2)}
        assert set(labels) == set(NAMES)
        references = References("boxes", files, labels, {}, {})
        requests = []
        for case in files:
            names = {"case0": ("liver",), "case1": ("liver", "spleen"), "case2": ("liver", "trunk", "aorta"), "case3": ("liver", "Liver")}[
                case
            ]
            requests += [Request(f"{case}/{i}".replace("/", "."), case, n, (n.lower(),), "lay") for i, n in enumerate(names)]
        write_requests(tmp_path / "requests.jsonl", requests)
        model = Predictor(f"scripted:{tmp_path / 'script.json'}", ScriptedReasoner(verbatim), device="cpu")
        predict_folder(images, tmp_path / "out", model, requests=tmp_path / "requests.jsonl")
        found = evaluate(tmp_path / "out", references, requests)
        assert found.faults == ()
        assert {(r.case, r.target): r.scores.dice for r in found.rows if r.truth == "present"} == {
            (r.case, r.target[0]): 1.0 for r in requests if r.target != ("aorta",)
        }
        assert found.absent.requests == 1
        assert found.absent.false_positives == 0
        assert found.about.model["segmenter"]

    def test_prompts_are_found_by_their_text(self, raw, tmp_path):
        dataset = open_dataset(raw)
        write_prediction(tmp_path / "out", "a", [{"id": "prompt1", "text": "Left  lung", "value": 1}], labels_of())
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), [], optional=label_prompts(dataset))
        assert [(r.kind, r.target, r.scores.dice) for r in found.rows] == [("label prompt", "left lung", 1.0)]


class TestRefusals:
    def test_missing_predictions_are_an_error_or_left_out_and_said(self, raw, tmp_path):
        dataset = predict_perfectly(raw, tmp_path / "out")
        (tmp_path / "out" / "a.json").unlink()
        (tmp_path / "out" / "b.nii.gz").unlink()
        references = References.of_dataset(dataset)
        with pytest.raises(OutputError, match=r"12 requests have no prediction.*--chill"):
            evaluate(tmp_path / "out", references, dataset.requests)
        found = evaluate(tmp_path / "out", references, dataset.requests, chill=True)
        assert len(found.missing) == 12
        assert {r.case for r in found.rows} == {"c", "d"}
        assert "12 not predicted and left out" in text_table(found)
        chosen = evaluate(tmp_path / "out", references, dataset.requests, cases=["c"], split="val", fold=0)
        assert chosen.missing == ()
        assert "split val (fold 0)" in text_table(chosen)

    def test_predicted_for_another_text(self, raw, tmp_path):
        dataset = predict_perfectly(raw, tmp_path / "out")
        requests = [replace(r, text="something else") if r.id == "a-left-lay" else r for r in dataset.requests]
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), requests)
        assert len(found.faults) == 1
        assert "predicted for the text 'lay left'" in found.faults[0]

    def test_unknown_label_has_a_suggestion(self, raw, tmp_path):
        dataset = open_dataset(raw)
        save(tmp_path / "out" / "a__q.nii.gz", labels_of() == 1, affine())
        with pytest.raises(DatasetError, match="Did you mean left lung"):
            evaluate(tmp_path / "out", References.of_dataset(dataset), [Request("q", "a", "x", ("left lugn",))])

    @pytest.mark.parametrize("content", ["{", '{"schema": 1}', '{"schema": 7, "requests": []}', '{"schema": 1, "requests": [3]}'])
    def test_damaged_case_file(self, raw, tmp_path, content):
        dataset = predict_perfectly(raw, tmp_path / "out")
        (tmp_path / "out" / "a.json").write_text(content)
        found = evaluate(tmp_path / "out", References.of_dataset(dataset), dataset.requests)
        assert len(found.faults) == 1
        assert "a.json" in found.faults[0]

    @settings(max_examples=60)
    @given(st.dictionaries(st.sampled_from(["status", "value", "file", "target_answered", "text", "seconds", "style"]), ODDITIES))
    def test_whatever_a_case_file_says_of_a_request_is_no_crash(self, raw, tmp_path, entry):
        dataset = open_dataset(raw)
        out = tmp_path / "out"
        save(out / "a.nii.gz", labels_of(), affine())
        content = {"schema": 1, "case": "a", "model": {}, "requests": [{"id": "a-left-lay", **entry}]}
        (out / "a.json").write_text(json.dumps(content), encoding="utf-8")
        try:
            found = evaluate(out, References.of_dataset(dataset), [r for r in dataset.requests if r.id == "a-left-lay"])
        except SeerSegError:
            return
        json.dumps(found.to_json(), allow_nan=False)
        text_table(found)

    def test_a_file_name_cannot_leave_the_folder(self, raw, tmp_path):
        dataset = open_dataset(raw)
        save(tmp_path / "secret.nii.gz", labels_of() == 1, affine())
        write_prediction(tmp_path / "out", "a", [{"id": "a-left-lay", "text": "lay left", "file": "../secret.nii.gz"}])
        with pytest.raises(OutputError, match="no prediction"):
            evaluate(tmp_path / "out", References.of_dataset(dataset), [r for r in dataset.requests if r.id == "a-left-lay"])

    def test_nothing_there(self, raw, tmp_path):
        references = References.of_dataset(open_dataset(raw))
        (tmp_path / "empty").mkdir()
        with pytest.raises(NothingToDoError, match="holds no predictions"):
            evaluate(tmp_path / "empty", references, [])
        with pytest.raises(UsageError, match="does not exist"):
            evaluate(tmp_path / "nowhere", references, [])
        with pytest.raises(NothingToDoError, match="holds no label map"):
            References.of_folder(tmp_path / "empty", {"x": (1,)})
        with pytest.raises(UsageError, match="No label was named"):
            evaluate_label_maps(tmp_path / "empty", replace(references, labels={}))


class TestLabelMaps:
    def test_values_regions_and_nnunet_keys(self, tmp_path):
        for case, shift in (("a", 0), ("b", 1)):
            save(tmp_path / "gt" / f"{case}.nii.gz", labels_of(), affine())
            save(tmp_path / "out" / f"{case}.nii.gz", labels_of(shift), affine())
        references = References.of_folder(tmp_path / "gt", {"left lung": (1,), "lungs": (1, 2), "other": (9,)})
        found = evaluate_label_maps(tmp_path / "out", references)
        dice = {(r.case, r.target): r.scores.dice for r in found.rows}
        assert dice["a", "left lung"] == 1.0
        assert dice["b", "left lung"] == dice["b", "lungs"] == pytest.approx(5 / 6)
        assert dice["a", "other"] is None
        assert found.absent.requests == 2
        summary = found.to_json()
        assert summary["mean"]["1"]["Dice"] == pytest.approx(11 / 12)
        assert summary["foreground_mean"]["Dice"] == pytest.approx(11 / 12)
        assert summary["metric_per_case"][1]["metrics"]["(1, 2)"]["n_ref"] == 2 * 5 * 7 * 6
        assert found.summary("label map").macro_dice == pytest.approx(11 / 12)

    def test_lesions(self, tmp_path):
        gt = np.zeros(SHAPE, np.uint8)
        gt[1:3, 1:3, 1:3] = gt[6:9, 6:9, 6:9] = gt[11:13, 2:4, 12:14] = 1
        drawn = gt.copy()
        drawn[11:13] = 0
        drawn[1:3, 12:14, 1:3] = 1
        save(tmp_path / "gt" / "a.nii.gz", gt, affine())
        save(tmp_path / "out" / "a.nii.gz", drawn, affine())
        found = evaluate_label_maps(
            tmp_path / "out", References.of_folder(tmp_path / "gt", {"lesion": (1,)}), scoring=Scoring(lesions=True)
        )
        (summary, _) = found.summaries
        assert summary.lesions["f1"] == pytest.approx(2 / 3)
        assert summary.lesions["detection_rate"] == pytest.approx(2 / 3)
        assert "Lesions (label map): f1 0.667" in text_table(found)
        write_csv(tmp_path / "rows.csv", found.rows)
        with (tmp_path / "rows.csv").open() as file:
            (line,) = csv.DictReader(file)
        assert float(line["lesions_f1"]) == pytest.approx(2 / 3)

    def test_two_files_of_one_case_are_refused(self, tmp_path):
        for ending in (".nii.gz", ".nii"):
            save(tmp_path / "gt" / f"a{ending}", labels_of(), affine())
        with pytest.raises(UsageError, match="name the same case"):
            References.of_folder(tmp_path / "gt", {"x": (1,)})


def row(case, value, kind="free text", target="liver", style="lay"):
    scores = MaskScores(value, value, value, 10 * (1 - value), 1.0, 1, 1, 1, 1.0, 1.0, 1.0)
    return Row(case, case[:2], f"{case}-{kind}-{target}-{style}-{value}", kind, target, "present", style=style, status="ok", scores=scores)


class TestTables:
    def test_fits_100_columns_and_says_where_numbers_come_from(self):
        rng = np.random.default_rng(0)
        model = {
            "reasoner": "Qwen/Qwen3-VL-4B-Instruct",
            "segmenter": "voxtell",
            "protocol": "seer",
            "plans": "SeerSegPlans",
            "bank_mode": "frozen",
        }
        rows = []
        for case in [f"s{i}_{j}" for i in range(6) for j in range(2)]:
            for target in ("anterior hippocampus of the left hemisphere", "liver"):
                rows.append(row(case, float(rng.uniform(0.8, 0.95)), "label prompt", target))
                rows += [row(case, float(rng.uniform(0.5, 0.95)), "free text", target, s) for s in ("lay", "typo", "abbreviation")]
        about = About(
            "Dataset004_Hippocampus", "out", "test", 0, {"": 1.0, "liver": 3.0}, model, reference_note="automatic, by another tool"
        )
        found = summarise(about, rows)
        table = text_table(found)
        assert max(len(line) for line in table.splitlines()) <= 100
        for needed in (  # wrapped lines are joined
            "split test (fold 0)",
            "bank frozen",
            "12 cases of 6 subjects",
            "95% intervals",
            "automatic",
            "1 mm (liver 3)",
            "Free text less label",
        ):
            assert needed in " ".join(table.split())
        overall = found.summary("free text")
        assert overall.macro_dice == pytest.approx(np.mean([found.summary("free text", t).dice.mean for t in {r.target for r in rows}]))

    def test_numbers_in_names_are_sorted_as_numbers(self):
        found = summarise(About("d", "p"), [row("s1_0", 0.5, target=t) for t in ("L10", "L2", "10", "9", "left")])
        assert [s.target for s in found.summaries] == ["9", "10", "L2", "L10", "left", ""]

    def test_hits_are_findings_with_some_overlap(self):
        found = summarise(About("d", "p"), [row("s1_0", 0.09), row("s2_0", 0.1), row("s3_0", 0.9), row("s4_0", 0.0)])
        assert found.summary("free text").hit_rate == 0.5

    def test_means_are_over_cases_not_over_requests(self):
        rows = [row("s1_0", 1.0)] + [row("s2_0", 0.0, style=f"style{i}") for i in range(9)]
        assert summarise(About("d", "p"), rows).summary("free text").dice.mean == 0.5

    def test_the_cost_is_paired(self):
        rows = [row("s1_0", 0.9, "label prompt"), row("s1_0", 0.8), row("s2_0", 0.1, "label prompt"), row("s3_0", 0.2)]
        (cost, _) = summarise(About("d", "p"), rows).costs
        assert cost.difference.mean == pytest.approx(-0.1)
        assert cost.difference.cases == 1


class TestCommand:
    """seerseg_evaluate as typed."""

    @pytest.fixture
    def run(self, monkeypatch, raw):
        from click.testing import CliRunner

        from seerseg.cli.evaluate import evaluate as command

        monkeypatch.setenv("seerseg_raw", str(raw.parent))

        def run(*words):
            return CliRunner().invoke(command, [str(w) for w in words], catch_exceptions=False)

        return run

    def test_requests_of_a_dataset(self, run, raw, tmp_path):
        predict_perfectly(raw, tmp_path / "out")
        done = run("-d", 9, "-i", tmp_path / "out", "-np", 1, "--csv", tmp_path / "rows.csv", "--tolerance_mm", 2, "left lung=1")
        assert done.exit_code == 0, done.output
        assert "Answered with the target's name: 100.0%" in done.output
        assert "NSD at 2 mm (left lung 1)" in done.output
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["schema"] == 1
        assert len(summary["rows"]) == len((tmp_path / "rows.csv").read_text().splitlines()) - 1 == 32
        again = run("-d", "Dataset009_Boxes", "-i", tmp_path / "out", "--json", "-o", tmp_path / "here.json", "--cases", "a", "b")
        assert {r["case"] for r in json.loads(again.stdout)["rows"]} == {"a", "b"}
        assert (tmp_path / "here.json").is_file()

    def test_one_language_split(self, run, raw, tmp_path):
        predict_perfectly(raw, tmp_path / "out")
        done = run("-d", 9, "-i", tmp_path / "out", "--language", "test")
        assert done.exit_code == 0, done.output
        assert "test language" in done.output
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert {r["style"] for r in summary["rows"]} == {"typo", "label_prompt"}

    def test_label_maps_as_nnunet_users_type_it(self, run, raw, tmp_path):
        predict_perfectly(raw, tmp_path / "out")
        gt = raw / "labelsTr"
        for words in (("-l", 1, 2), ("-djfile", raw / "dataset.json", "-pfile", "plans.json", "-np", 2), ("-l", 1, 2, "-il", 3, "--chill")):
            done = run(gt, tmp_path / "out", *words)
            assert done.exit_code == 0, done.output
            assert "7" in done.output
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["foreground_mean"]["Dice"] == 1.0

    def test_a_dataset_without_case_files_is_compared_by_value(self, run, raw, tmp_path):
        predict_perfectly(raw, tmp_path / "out")
        for file in (tmp_path / "out").glob("*.json"):
            file.unlink()
        done = run("-d", 9, "-i", tmp_path / "out")
        assert done.exit_code == 0, done.output
        assert "K" not in done.output.splitlines()[3]

    def test_exit_codes(self, run, raw, tmp_path):
        out = tmp_path / "out"
        predict_perfectly(raw, out)
        (tmp_path / "empty").mkdir()
        assert run("-d", 9, "-i", tmp_path / "empty").exit_code == 4
        for words in (
            ("-d", 9),
            ("-d", 9, "-i", tmp_path / "nowhere"),
            ("-d", 8, "-i", out),
            (out,),
            (out, out),
            (out, out, "-l", 1, "--split", "test"),
            ("-d", 9, "-i", out, "-l", 1),
            ("-d", 9, "-i", out, "--tolerance_mm", "left lugn=1"),
            ("-d", 9, "-i", out, "--tolerance_mm", "-1"),
            ("-d", 9, "-i", out, "--cases", "z"),
            ("-d", 9, "-i", out, "--split", "test"),  # two subjects only: no test cases
            ("-d", 9, "-i", out, "--split", "val", "-f", 7),
        ):
            done = run(*words)
            assert done.exit_code == 2, (words, done.output)
            assert "Traceback" not in done.output
        done = run("-d", 9, "-i", out, "-o", out / "a.nii.gz" / "summary.json")
        assert done.exit_code == 1
        assert "Cannot write" in done.output
        assert "left lung" in done.output  # the numbers are not lost
        (out / "b.nii.gz").write_bytes(b"no image")
        done = run("-d", 9, "-i", out)
        assert done.exit_code == 3
        assert "b.nii.gz" in done.output
        (out / "b.json").unlink()
        done = run("-d", 9, "-i", out)
        assert done.exit_code == 1
        assert "--chill" in done.output
        assert run("-d", 9, "-i", out, "--chill").exit_code == 0
        (tmp_path / "list.json").write_text("[1]")
        assert run(out, out, "-djfile", tmp_path / "list.json").exit_code == 1

    def test_help_is_light(self):
        import subprocess
        import sys

        code = (
            "import sys\nfrom seerseg.cli.evaluate import evaluate\n"
            "try:\n    evaluate(['--help'])\nexcept SystemExit:\n    pass\n"
            "print([m for m in ('torch', 'numpy', 'scipy', 'nibabel', 'matplotlib') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.rstrip().endswith("[]")

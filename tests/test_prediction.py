"""Prediction of folders: what is written, what is skipped, what is said when something is wrong, and the in-memory API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from prediction_cases import ORIENTATIONS, make_folder, make_scan, snapshot, stored_mask

from seerseg.errors import GeometryError, ImageError, NothingToDoError, OutputError, RequestError, UsageError
from seerseg.prediction import CaseResult, Options, Predictor, RunReport, predict_folder
from seerseg.prediction.outputs import FIRST_VALUE, Legend, bounding_box, file_suffixes
from seerseg.prompts import Prompt
from seerseg.protocols.messages import Message
from seerseg.reasoners.scripted import ScriptedReasoner
from seerseg.segmenters.base import Capabilities, ModelCard, Segmentation, Session
from seerseg.segmenters.scripted import ScriptedSegmenter
from seerseg.volume import Mask, Volume


def said(answer: str) -> str:
    return f"<evidence>e</evidence><rationale>r</rationale><answer>{answer}</answer>"


def predictor(root: Path, **replies: str) -> Predictor:
    """The scripted segmenter of `root`; the words are the answer, but for `replies` (request text -> raw reply)."""

    def answer(dialogue: Sequence[Message], sample: int) -> str:
        text = dialogue[-1].text
        words = text[text.rindex("<raw_prompt>") + 12 : text.rindex("</raw_prompt>")]
        return replies.get(words, said(words))

    return Predictor(f"scripted:{root / 'script.json'}", ScriptedReasoner(answer), device="cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_folder(tmp_path)
    return tmp_path


def run(
    root: Path, *prompts: str, output: str = "out", source: str = "images", model: Predictor | None = None, **settings: Any
) -> RunReport:
    return predict_folder(root / source, root / output, model or predictor(root), prompts=prompts, **settings)


def load(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def record(root: Path, case: str, output: str = "out") -> dict[str, Any]:
    value: dict[str, Any] = json.loads((root / output / f"{case}.json").read_text())
    return value


# --------------------------------------------------------------------------------------------------------------- what is written


def test_one_request_gives_a_binary_mask_as_the_scan_is_stored(root: Path) -> None:
    report = run(root, "liver")
    assert (report.exit_code, report.count("done")) == (0, 4)
    for i, codes in enumerate(ORIENTATIONS):
        image = root / "images" / f"case{i}_0000.nii.gz"
        mask = nib.load(root / "out" / f"case{i}.nii.gz")
        assert "".join(nib.aff2axcodes(mask.affine)) == codes
        assert np.allclose(mask.affine, nib.load(image).affine)
        assert mask.get_data_dtype() == np.uint8
        assert np.array_equal(load(root / "out" / f"case{i}.nii.gz"), stored_mask(image, "liver"))
        assert record(root, f"case{i}")["legend"] == {"1": "liver"}


def test_several_requests_give_a_label_map_with_its_legend(root: Path) -> None:
    run(root, "liver", "spleen", "left kidney")
    for i in range(4):
        told = record(root, f"case{i}")
        labels = load(root / "out" / f"case{i}.nii.gz")
        assert told["separate_files"] is None
        assert set(told["legend"].values()) == {"liver", "spleen", "left kidney"}
        for value, name in told["legend"].items():
            assert np.array_equal(labels == int(value), stored_mask(root / "images" / f"case{i}_0000.nii.gz", name))
        assert {r["file"] for r in told["requests"]} == {f"case{i}.nii.gz"}
        assert [told["legend"][str(r["value"])] for r in told["requests"]] == ["liver", "spleen", "left kidney"]
    assert not list((root / "out").glob("*__*"))


def test_a_value_means_the_same_whatever_is_asked_in_which_order_and_shard(root: Path) -> None:
    run(root, "liver", "spleen")
    run(root, "left kidney", "spleen", output="other", num_parts=2, part_id=1)
    first, second = record(root, "case1")["legend"], record(root, "case1", "other")["legend"]
    assert {v for v, n in first.items() if n == "spleen"} == {v for v, n in second.items() if n == "spleen"}
    assert not set(first) & {v for v, n in second.items() if n == "left kidney"}


def test_overlapping_masks_are_reported_and_written_singly(root: Path) -> None:
    run(root, "trunk", "liver")
    told = record(root, "case0")
    image = root / "images" / "case0_0000.nii.gz"
    liver, trunk = stored_mask(image, "liver"), stored_mask(image, "trunk")
    assert told["overlaps"] == [{"between": ["trunk", "liver"], "kept": "liver", "voxels": int((liver & trunk).sum())}]
    assert told["separate_files"] == "masks overlap"
    labels, values = load(root / "out" / "case0.nii.gz"), {n: int(v) for v, n in told["legend"].items()}
    assert np.array_equal(labels == values["liver"], liver)
    assert np.array_equal(labels == values["trunk"], trunk & ~liver)
    assert np.array_equal(load(root / "out" / "case0__1-trunk.nii.gz"), trunk)
    assert [(r["file"], r["value"]) for r in told["requests"]] == [("case0__1-trunk.nii.gz", 1), ("case0__2-liver.nii.gz", 1)]


def test_requests_that_mean_one_target_are_written_singly(root: Path) -> None:
    run(root, "liver", "the big one", model=predictor(root, **{"the big one": said("Liver")}))
    told = record(root, "case0")
    assert told["separate_files"] == "several requests mean one target"
    assert len(told["legend"]) == 1
    first, second = (load(root / "out" / r["file"]) for r in told["requests"])
    assert np.array_equal(first, second)


def test_per_request_files_on_demand(root: Path) -> None:
    run(root, "liver", "spleen", options=Options(per_request=True))
    assert {p.name for p in (root / "out").glob("case0*")} == {
        "case0.json", "case0.nii.gz", "case0__1-liver.nii.gz", "case0__2-spleen.nii.gz"
    }  # fmt: skip
    image = root / "images" / "case0_0000.nii.gz"
    assert np.array_equal(load(root / "out" / "case0__2-spleen.nii.gz"), stored_mask(image, "spleen"))


def test_an_absent_target_gives_a_mask_of_zeros(root: Path) -> None:
    report = run(root, "uterus", model=predictor(root, uterus=said("absent")))
    assert report.exit_code == 0
    assert not load(root / "out" / "case0.nii.gz").any()
    request = record(root, "case0")["requests"][0]
    assert (request["status"], request["file"], request["value"], request["voxels"], request["volume_ml"]) == (
        "absent", "case0.nii.gz", None, 0, 0.0
    )  # fmt: skip


def test_labels_of_the_datasets_own_when_the_input_belongs_to_one(root: Path) -> None:
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 5, "liver": 7}}))
    run(root, "liver", "spleen", "left kidney")
    legend = record(root, "case0")["legend"]
    assert (legend["5"], legend["7"]) == ("spleen", "liver")
    assert min(int(v) for v, name in legend.items() if name == "left kidney") >= 4096
    assert nib.load(root / "out" / "case0.nii.gz").get_data_dtype() == np.uint16


def test_a_picture_on_demand(root: Path) -> None:
    from PIL import Image

    run(root, "liver", options=Options(overlay=True))
    with Image.open(root / "out" / "case0.png") as picture:
        pixels = np.asarray(picture)
    assert (pixels[..., 0] > pixels[..., 1]).sum() > 100  # painted red where the liver is


def test_a_side_asked_of_an_image_without_sides_warns(tmp_path: Path) -> None:
    make_folder(tmp_path, 1)
    path = tmp_path / "images" / "case0_0000.nii.gz"
    image = nib.load(path)
    image.set_sform(image.affine, code=0)
    image.set_qform(image.affine, code=0)
    blank = nib.Nifti1Image(np.asanyarray(image.dataobj), None, image.header)
    blank.header["sform_code"] = blank.header["qform_code"] = 0
    blank.to_filename(path)
    labels = tmp_path / "labels" / "case0.labels.nii.gz"
    nib.Nifti1Image(load(labels), None, blank.header).to_filename(labels)
    run(tmp_path, "left kidney", "liver")
    told = record(tmp_path, "case0")
    assert told["image"]["laterality"] == "assumed"
    assert len(told["warnings"]) == 1
    assert "names a side" in told["warnings"][0]


# ------------------------------------------------------------------------------------------------------------ resume by content


def test_a_second_run_does_nothing_and_exits_0(root: Path) -> None:
    run(root, "liver")
    before = {p: p.stat().st_mtime_ns for p in (root / "out").iterdir()}
    report = run(root, "liver")
    assert (report.exit_code, report.count("skipped")) == (0, 4)
    assert {p: p.stat().st_mtime_ns for p in (root / "out").iterdir()} == before
    assert report.results[0].record["requests"][0]["target_answered"] == "liver"


def test_only_what_changed_is_done_again_as_a_corrected_scan_under_an_old_name_is(root: Path) -> None:
    segmenter = ScriptedSegmenter({"liver": lambda volume, prompt: volume.array > 80}, identity="fixed")
    model = Predictor(segmenter, "verbatim", device="cpu")
    run(root, "liver", model=model)
    shutil.copy(root / "images" / "case3_0000.nii.gz", root / "images" / "case1_0000.nii.gz")
    report = run(root, "liver", model=model)
    assert {r.case: r.status for r in report.results} == {"case0": "skipped", "case1": "done", "case2": "skipped", "case3": "skipped"}
    (root / "out" / "case2.nii.gz").write_bytes((root / "out" / "case2.nii.gz").read_bytes()[:-20])
    (root / "out" / "case3.json").unlink()
    report = run(root, "liver", model=model)
    assert {r.case for r in report.results if r.status == "done"} == {"case2", "case3"}
    for settings in ({"options": Options(per_request=True)}, {"options": Options(modality="CT")}):
        assert run(root, "liver", model=model, **settings).count("done") == 4
    assert run(root, "liver", "liver ", model=model).count("done") == 4
    assert run(root, "liver", model=Predictor(segmenter, "verbatim", device="cpu", seed=3)).count("done") == 4
    assert run(root, "liver", model=model, options=Options(overwrite=True)).count("done") == 4


def test_files_of_an_earlier_request_do_not_stay_beside_the_new_ones(root: Path) -> None:
    run(root, "liver", "trunk")
    (root / "out" / "mine.txt").write_text("not ours")
    run(root, "spleen")
    assert {p.name for p in (root / "out").glob("case0*")} == {"case0.json", "case0.nii.gz"}
    assert (root / "out" / "mine.txt").exists()


def test_temporary_files_of_a_killed_run_are_cleaned_but_not_those_of_other_shards(root: Path) -> None:
    (root / "out").mkdir()
    names = [".tmp-abcdefgh-case0.nii.gz", ".tmp-abcdefgh-case0__r.nii.gz", ".tmp-abcd_fgh-case2.json", ".tmp-abcdefgh-case1.nii.gz"]
    for name in names:
        (root / "out" / name).touch()
    run(root, "liver", num_parts=2, part_id=0)
    assert [p.name for p in (root / "out").glob(".tmp-*")] == [names[-1]]


def test_shards_together_are_the_whole_and_say_what_is_missing(root: Path) -> None:
    run(root, "liver", output="whole")
    first = run(root, "liver", num_parts=3, part_id=1)
    assert first.missing == ("case0", "case2", "case3")
    run(root, "liver", num_parts=3, part_id=2)
    last = run(root, "liver", num_parts=3, part_id=0)
    assert last.missing == ()
    assert snapshot(root / "out") == snapshot(root / "whole")
    assert run(root, "liver").count("skipped") == 4


@pytest.mark.parametrize(("num_parts", "part_id"), [(2, 2), (0, 0), (2, -1)])
def test_parts_that_do_not_exist(root: Path, num_parts: int, part_id: int) -> None:
    with pytest.raises(UsageError, match="counts from 0"):
        run(root, "liver", num_parts=num_parts, part_id=part_id)


def test_stopping_leaves_the_rest_for_the_next_run(root: Path) -> None:
    done: list[CaseResult] = []
    report = run(root, "liver", progress=lambda result, total: done.append(result), stopping=lambda: len(done) > 0)
    assert report.exit_code == 75
    assert 0 < report.count("done") < 4
    assert len(report.not_started) == 4 - report.count("done")
    assert run(root, "liver").count("skipped") == report.count("done")


@pytest.mark.parametrize("overlap", [True, False])
def test_overlap_changes_nothing_that_is_written(root: Path, overlap: bool) -> None:
    run(root, "liver", "trunk", "spleen", output="reference")
    run(root, "liver", "trunk", "spleen", options=Options(overlap=overlap, readers=3, writers=2, limit_bytes=1))
    assert snapshot(root / "out") == snapshot(root / "reference")


# --------------------------------------------------------------------------------------------------------------------- bad input


def spoil_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def spoil_no_image(path: Path) -> None:
    path.write_bytes(b"this is a text")


def spoil_4d(path: Path) -> None:
    nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)).to_filename(path)


def spoil_singular(path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4))
    image.header["sform_code"] = 1
    image.header["srow_x"] = 0
    nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), None, image.header).to_filename(path)


def spoil_nan(path: Path) -> None:
    nib.Nifti1Image(np.full((4, 4, 4), np.nan, np.float32), np.eye(4)).to_filename(path)


def spoil_gone(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere.nii.gz")


@pytest.mark.parametrize("spoil", [spoil_truncated, spoil_no_image, spoil_4d, spoil_singular, spoil_nan, spoil_gone])
def test_one_bad_scan_fails_alone_with_a_sentence(root: Path, spoil: Any) -> None:
    spoil(root / "images" / "case1_0000.nii.gz")
    report = run(root, "liver")
    assert report.exit_code == 3
    assert {r.case: r.status for r in report.results} == {"case0": "done", "case1": "failed", "case2": "done", "case3": "done"}
    failed = report.results[1]
    assert "case1_0000.nii.gz" in failed.error
    assert not failed.fault, failed.fault
    assert not (root / "out" / "case1.nii.gz").exists()
    assert record(root, "case1")["requests"][0]["status"] == "failed"
    assert report.missing == ("case1",)


def test_a_constant_scan_is_no_fault(root: Path) -> None:
    labels = nib.load(root / "labels" / "case1.labels.nii.gz")
    nib.Nifti1Image(np.full(labels.shape, 7, np.int16), labels.affine).to_filename(root / "images" / "case1_0000.nii.gz")
    assert run(root, "liver").exit_code == 0


def test_a_sibling_channel_on_another_grid(root: Path) -> None:
    for i in range(4):
        shutil.copy(root / "images" / f"case{i}_0000.nii.gz", root / "images" / f"case{i}_0001.nii.gz")
    path = root / "images" / "case2_0001.nii.gz"
    image = nib.load(path)
    moved = image.affine.copy()
    moved[:3, 3] += 5.3
    nib.Nifti1Image(np.asanyarray(image.dataobj), moved).to_filename(path)
    report = run(root, "liver")
    assert {r.case for r in report.results if r.status == "failed"} == {"case2"}
    assert "--resample_channels" in report.results[2].error
    assert run(root, "liver", options=Options(resample_channels=True)).exit_code == 0
    assert run(root, "liver", options=Options(channel=2)).count("failed") == 4


@pytest.mark.parametrize("reply", ["", "no tags at all", "<answer></answer>", "\0<evidence>", said("absent " * 500), "<answer>liver"])
def test_a_reply_that_cannot_be_read_fails_that_request_alone(root: Path, reply: str) -> None:
    report = run(root, "liver", "mumble", model=predictor(root, mumble=reply))
    assert report.exit_code == 3
    assert report.count("partial") == 4
    told = record(root, "case0")
    assert [r["status"] for r in told["requests"]] == ["ok", "fault"]
    assert told["requests"][1]["file"] is None
    assert (load(root / "out" / "case0.nii.gz") > 0).sum() == told["requests"][0]["voxels"]
    assert run(root, "liver", "mumble").count("skipped") == 0


class Breaking:
    """A segmenter that fails on one case, in a way of the test's choosing."""

    capabilities = Capabilities(text="open")
    card = ModelCard(name="breaking", identity="breaking-1")

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        if volume.name == "case2":
            raise self.error
        return [Segmentation(p, "ok", Mask(volume.array > 100, volume.grid)) for p in prompts]

    def session(self, volume: Volume) -> Session:
        raise NotImplementedError


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("a bug"), MemoryError(), ZeroDivisionError()])
def test_a_segmenter_that_breaks_on_one_case_does_not_end_the_run(root: Path, error: Exception) -> None:
    report = run(root, "liver", model=Predictor(Breaking(error), "verbatim", device="cpu"))
    assert {r.case: r.status for r in report.results} == {"case0": "done", "case1": "done", "case2": "failed", "case3": "done"}
    assert "case2" in report.results[2].error


def test_an_interrupt_in_a_stage_ends_the_run_at_once(root: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(root, "liver", model=Predictor(Breaking(KeyboardInterrupt()), "verbatim", device="cpu"))
    assert run(root, "liver", model=Predictor(Breaking(ValueError()), "verbatim", device="cpu")).count("skipped") >= 1


def test_an_unsupported_target_is_said_not_drawn(root: Path) -> None:
    segmenter = ScriptedSegmenter({"liver": lambda volume, prompt: volume.array > 80}, identity="fixed")
    report = run(root, "liver", "box of tricks", model=Predictor(LiverOnly(segmenter), "verbatim", device="cpu"))
    assert report.count("partial") == 4
    request = record(root, "case0")["requests"][1]
    assert (request["status"], request["message"], request["nearest"]) == ("unsupported", "It cannot.", ["liver"])


class LiverOnly:
    """Draws the liver and says of everything else that it cannot."""

    def __init__(self, inner: ScriptedSegmenter) -> None:
        self.inner, self.capabilities, self.card = inner, Capabilities(text="open"), inner.card

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        return [self.one(volume, prompt) for prompt in prompts]

    def one(self, volume: Volume, prompt: Prompt) -> Segmentation:
        if prompt.text == "liver":
            return self.inner.segment(volume, [prompt])[0]
        return Segmentation(prompt, "unsupported", message="It cannot.", nearest=("liver",))

    def session(self, volume: Volume) -> Session:
        return self.inner.session(volume)


def test_missing_channels_and_double_names_fail_alone(root: Path) -> None:
    for i in (0, 1, 2):
        shutil.copy(root / "images" / f"case{i}_0000.nii.gz", root / "images" / f"case{i}_0001.nii.gz")
    report = run(root, "liver")
    assert report.exit_code == 3
    assert {r.case for r in report.results if r.status == "failed"} == {"case3"}
    assert "case3_0001" in record(root, "case3")["error"]


def test_nothing_to_do_and_misuse(root: Path, tmp_path: Path) -> None:
    (root / "empty").mkdir()
    with pytest.raises(NothingToDoError):
        run(root, "liver", source="empty")
    with pytest.raises(UsageError, match="no request"):
        run(root)
    with pytest.raises(UsageError, match="input folder"):
        run(root, "liver", output="images")
    with pytest.raises(UsageError, match="must name a folder"):
        run(root, "liver", output="out.nii.gz")
    (root / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        run(root, "liver", output="file")
    with pytest.raises(OutputError, match="Cannot make"):
        run(root, "liver", output="file/below")
    scan = shutil.copy(root / "images" / "case0_0000.nii.gz", root / "single.nii.gz")
    with pytest.raises(UsageError, match="would overwrite"):
        predict_folder(scan, root, predictor(root), prompts=["liver"])
    assert load(root / "single.nii.gz").any()


def test_a_corrupt_ledger_is_reported_and_its_cases_done_again(root: Path) -> None:
    run(root, "liver")
    ledger = root / "out" / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(lines[0] + b"\xff\xfe garbage\n" + b"{}\n" + lines[1] + lines[2][:40])
    report = run(root, "liver")
    assert (report.exit_code, report.count("skipped"), report.count("done")) == (0, 2, 2)
    assert [note.split(" ")[0] for note in report.notes] == ["ledger.jsonl:2", "ledger.jsonl:3"]


# -------------------------------------------------------------------------------------------------------------------- in memory


@pytest.fixture
def in_memory() -> Predictor:
    segmenter = ScriptedSegmenter({"bright": lambda volume, prompt: volume.array > 50}, identity="fixed")
    return Predictor(segmenter, ScriptedReasoner({"brite": said("bright"), "*": said("absent")}), device="cpu")


def test_a_path_gives_a_mask_as_stored(tmp_path: Path, in_memory: Predictor) -> None:
    for codes in ORIENTATIONS:
        path = make_scan(tmp_path / "images" / "a.nii.gz", codes=codes)
        made = in_memory.predict(path, "brite")
        assert (made.status, made.target) == ("ok", "bright")
        assert made.array is not None
        assert np.array_equal(made.array, load(path) > 50)
        image = nib.load(path)
        again = in_memory.predict(image, ["brite", "nothing"])
        assert np.array_equal(again[0].array, made.array)
        assert (again[1].status, again[1].target, again[1].volume_ml) == ("absent", None, 0.0)


def test_an_array_gives_a_mask_in_its_own_order(in_memory: Predictor) -> None:
    array = np.random.default_rng(0).normal(40, 20, (5, 6, 7)).astype(np.float64)
    affine = np.array([[0, 0, -2.0, 9], [-1, 0, 0, 8], [0, 3, 0, 7], [0, 0, 0, 1]])
    for settings in ({"affine": affine}, {"spacing_zyx_mm": (3, 1, 1)}, {}):
        made = in_memory.predict(array, "brite", **settings)
        assert made.array is not None
        assert made.array.shape == array.shape
        assert np.array_equal(made.array, array.astype(np.float32) > 50)
    assert in_memory.predict(array, "brite", spacing_zyx_mm=(3, 1, 1)).volume_ml == pytest.approx((array > 50).sum() * 3e-3)
    flat = in_memory.predict(array[0], "brite")
    assert flat.array is not None
    assert flat.array.shape == (1, 6, 7)
    volume = Volume(array.astype(np.float32), flat.mask.grid.__class__((5, 6, 7), np.eye(4)))  # type: ignore[union-attr]
    assert np.array_equal(in_memory.predict(volume, "brite").array, array.astype(np.float32) > 50)


def test_bad_arrays_and_texts_are_sentences(in_memory: Predictor) -> None:
    array = np.zeros((3, 3, 3))
    with pytest.raises(ImageError, match=r"shape \(2, 3, 3, 3\)"):
        in_memory.predict(np.zeros((2, 3, 3, 3)), "brite")
    with pytest.raises(GeometryError, match="singular"):
        in_memory.predict(array, "brite", affine=np.zeros((4, 4)))
    with pytest.raises(UsageError, match="spacing"):
        in_memory.predict(array, "brite", spacing_zyx_mm=(1, 0, 1))
    with pytest.raises(UsageError, match="not both"):
        in_memory.predict(array, "brite", spacing_zyx_mm=(1, 1, 1), affine=np.eye(4))
    with pytest.raises(ImageError, match="finite"):
        in_memory.predict(np.full((3, 3, 3), np.nan), "brite")
    for text in ("", "  \n", "x" * 10_000):
        with pytest.raises(RequestError):
            in_memory.predict(array, text)


def test_equal_answers_are_drawn_once(tmp_path: Path) -> None:
    seen: list[int] = []

    class Counting(Breaking):
        def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
            seen.append(len(prompts))
            return super().segment(volume, prompts)

    model = Predictor(Counting(ValueError()), ScriptedReasoner([said("liver"), said("liver"), said("spleen"), said("liver")]), device="cpu")
    made = model.predict(np.full((3, 3, 3), 200), ["a", "b", "c", "d"])
    assert seen == [2]
    assert made[0].mask is not None
    assert made[1].mask is not None
    assert made[0].mask.array is made[1].mask.array


# ------------------------------------------------------------------------------------------------------------------------ details


def test_legend_values() -> None:
    legend = Legend(names=("liver", "spleen"))
    assert legend.assign(["spleen", "liver"]) == {"spleen": FIRST_VALUE + 1, "liver": FIRST_VALUE}
    assert legend.assign(["odd thing"])["odd thing"] == legend.assign(["liver", "odd thing"])["odd thing"] >= 4096
    assert Legend({"liver": 6}).assign(["Liver", "spleen"])["Liver"] == 6
    assert Legend({"liver": 6}).identity != legend.identity
    many = legend.assign([f"thing {i}" for i in range(3000)])
    assert len(set(many.values())) == 3000


def test_bounding_box() -> None:
    array = np.zeros((5, 6, 7), bool)
    assert bounding_box(array) is None
    array[1, 2, 3] = array[3, 2, 5] = True
    assert bounding_box(array) == (slice(1, 4), slice(2, 3), slice(3, 6))


def test_file_suffixes_are_safe_and_distinct() -> None:
    made = file_suffixes("c", ["a/b", "a b", "A-B", "left lung", "x"], taken={"c__x"})
    assert len({s.casefold() for s in made.values()}) == 5
    assert all("/" not in s and " " not in s for s in made.values())
    assert made["x"] != "x"


def test_a_model_folder_brings_its_labels_and_parts(root: Path) -> None:
    from seerseg.model import ModelSpec, write_spec

    folder = root / "model"
    folder.mkdir()
    spec = ModelSpec(
        reasoner="verbatim",
        segmenter=f"scripted:{root / 'script.json'}",
        targets=("liver", "spleen"),
        closed=True,
        label_values={"liver": (3,), "spleen": (8,), "both": (3, 8)},
        dataset="Dataset004_Organs",
        fold=0,
    )
    write_spec(folder, spec)
    report = run(root, "Liver", "spleen", "aorta", model=Predictor(model_folder=folder, device="cpu"))
    told = record(root, "case0")
    assert told["legend"] == {"3": "liver", "8": "spleen"}
    assert [r["status"] for r in told["requests"]] == ["ok", "ok", "fault"]
    assert report.count("partial") == 4
    assert told["model"]["dataset"] == "Dataset004_Organs"


def test_the_datasets_modality_is_told_to_the_model(root: Path) -> None:
    seen: list[str | None] = []

    def look(volume: Volume, prompt: Prompt) -> Any:
        seen.append(volume.modality)
        return volume.array > 80

    meta = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(meta))
    (root / "imagesTr").mkdir()
    shutil.copy(root / "images" / "case0_0000.nii.gz", root / "imagesTr")
    model = Predictor(ScriptedSegmenter({"liver": look}, identity="fixed"), "verbatim", device="cpu")
    run(root, "liver", model=model)
    assert seen == ["CT"] * 4
    assert record(root, "case0")["image"]["modality"] == "CT"
    run(root, "liver", model=model, options=Options(modality="MR"))
    assert seen[4:] == ["MR"] * 4


def test_a_picture_is_segmented_without_millilitres(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    pixels = np.zeros((20, 30), np.uint8)
    pixels[4:9, 10:14] = 200
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    segmenter = ScriptedSegmenter({"bright": lambda volume, prompt: volume.array > 100}, identity="fixed")
    report = run(tmp_path, "bright", model=Predictor(segmenter, "verbatim", device="cpu"))
    assert report.exit_code == 0, report.results
    told = record(tmp_path, "a")
    assert (told["requests"][0]["voxels"], told["requests"][0]["volume_ml"]) == (20, None)
    assert int(load(tmp_path / "out" / "a.nii.gz").sum()) == 20

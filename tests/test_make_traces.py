"""Traces of a dataset: what is in them, that runs go on where they stopped, and that bad input gets a sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from raw_datasets import make

from seerseg.cli.make_traces import make_traces
from seerseg.cli.plan_and_preprocess import plan_and_preprocess
from seerseg.dataset import Request, open_dataset
from seerseg.protocols import load_protocol
from seerseg.protocols.base import KeySlice
from seerseg.protocols.traces import TraceRow, read_traces
from seerseg.store import open_case
from seerseg.views import ViewSpec
from seerseg.volume import Grid, Volume
from seerseg_data.evidence import survey
from seerseg_data.rationales import brief_rationale, provenance, rationale, skill_tag
from seerseg_data.trace_checks import blank_views, check_parsing, known_protocols
from seerseg_data.traces import key_slices, name_labels, two_points

NAME = "Dataset007_Test"
CASES = ("case_1", "case_2", "case_3")
LABELS = {"background": 0, "liver": 1, "spleen": 2, "bladder": 3}


def requests_of(case: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{case}_a", "case": case, "text": "plz outline the livr", "target": "liver", "style": "messy_or_misspelled",
         "language_split": "train", "asked": "liver", "surface": "liver", "slips": ["dropped:liver>livr", "adjacent:please>plz"]},
        {"id": f"{case}_b", "case": case, "text": "spleen", "target": "spleen", "style": "formal_task", "language_split": "train"},
        {"id": f"{case}_c", "case": case, "text": "liver and spleen", "target": ["liver", "spleen"], "language_split": "train"},
        {"id": f"{case}_d", "case": case, "text": "the left kidney", "target": None, "style": "absent", "language_split": "test"},
        {"id": f"{case}_e", "case": case, "text": "urinary bladder", "target": "bladder", "style": "formal_task"},
        {"id": f"{case}_f", "case": case, "text": "whatever that is"},
    ]  # fmt: skip


def run(root: Path, *args: str) -> Result:
    folders = ["--raw_folder", str(root / "raw"), "--preprocessed_folder", str(root / "pre")]
    return CliRunner().invoke(make_traces, ["-d", "7", "-np", "1", *folders, *args])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preprocessed dataset of three cases with requests."""
    root = tmp_path_factory.mktemp("traces")
    make(root / "raw" / NAME, CASES, labels=LABELS, requests=[r for case in CASES for r in requests_of(case)])
    done = CliRunner().invoke(
        plan_and_preprocess, ["-d", "7", "-np", "1", "--raw_folder", str(root / "raw"), "--preprocessed_folder", str(root / "pre")]
    )
    assert done.exit_code == 0, done.output
    return root


@pytest.fixture
def place(prepared: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it."""
    shutil.copytree(prepared, tmp_path / "root")
    return tmp_path / "root"


def rows_of(root: Path) -> dict[str, TraceRow]:
    return {row.id: row for row in read_traces(root / "pre" / NAME / "traces.jsonl")[1]}


def test_every_request_with_a_known_truth_gets_a_trace(place: Path) -> None:
    done = run(place, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["datasets"][0]
    assert report["counts"]["rows"] == 15
    assert (report["counts"]["unknown"], report["counts"]["empty"], report["counts"]["absent"]) == (3, 3, 6)
    header, found = read_traces(place / "pre" / NAME / "traces.jsonl")
    assert (header["cases"], header["missing"], header["dataset"]) == (3, 0, NAME)
    assert [row.id for row in found] == [f"{case}_{letter}" for case in CASES for letter in "abcde"]
    rows = {row.id: row for row in found}
    liver = rows["case_1_a"].trace
    assert liver.answer == "liver"
    assert liver.skill == "MESSY_INPUT_REPAIR"
    assert liver.rationale.startswith("livr -> liver")
    assert rows["case_1_c"].trace.answer == "liver and spleen"
    for letter in "de":
        row = rows[f"case_1_{letter}"]
        assert (row.trace.answer, row.target, row.trace.slices, row.trace.skill) == ("absent", None, (), "OUT_OF_REGION_REJECT")
        assert "liver, spleen" in row.trace.evidence
        assert "kidney" not in row.trace.evidence
    key = rows["case_1_a"].trace.slices[0]
    assert (key.axis, key.area, key.boxes[0].lo, key.boxes[0].hi) == (0, 16, (2, 1), (6, 5))
    case = open_case(place / "pre" / NAME, "case_1")
    assert rows["case_1_a"].source["image"] == case.content_hash()


def test_traces_parse_under_every_protocol_and_answers_execute(place: Path) -> None:
    labels = {case: f"{place / 'raw' / NAME / 'labelsTr' / case}.nii.gz" for case in CASES}
    script = {"kind": "scripted_segmenter", "names": {"liver": 1, "spleen": 2, "liver and spleen": [1, 2]}, "cases": labels}
    (place / "script.json").write_text(json.dumps(script))
    done = run(place, "--trajectories", "scripted:" + str(place / "script.json"), "--check", "all", "--segmenter",
               "scripted:" + str(place / "script.json"), "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["datasets"][0]
    assert set(report["parsing"]) == set(known_protocols())
    for name, found in report["parsing"].items():
        assert found["share"] == 1.0, (name, found)
    execution = report["execution"]
    assert execution["label_prompt_dice"] == 1.0
    assert execution["answers_dice"]["seer"] == 1.0
    assert execution["difference"]["seer"] == 0.0
    assert execution["drawn"] < execution["rows"] * (1 + len(execution["answers_dice"]))
    turns = rows_of(place)["case_1_a"].trace.turns
    assert report["counts"]["shown"] + report["counts"].get("dropped", 0) == 18
    if turns:
        assert turns[-1].prompt is None


def test_a_wrong_trace_is_seen(place: Path) -> None:
    assert run(place).exit_code == 0
    rows = list(rows_of(place).values())
    from dataclasses import replace

    bad = replace(rows[0], trace=replace(rows[0].trace, answer="a <tag> </answer>" * 30))
    found = check_parsing([bad, rows[1]], place / "pre" / NAME, ViewSpec(), ["seer"])[0]
    assert found.parsed == 1
    assert found.faults[0].startswith("case_1_a: ")


def test_a_second_run_does_nothing_and_changes_are_done_again(place: Path) -> None:
    first = json.loads(run(place, "--json").stdout)["datasets"][0]
    before = (place / "pre" / NAME / "traces.jsonl").read_bytes()
    again = json.loads(run(place, "--json").stdout)["datasets"][0]
    assert (again["cases"]["done"], again["cases"]["skipped"]) == (0, 3)
    assert again["counts"] == first["counts"]
    assert (place / "pre" / NAME / "traces.jsonl").read_bytes() == before
    path = place / "raw" / NAME / "requests.jsonl"
    path.write_text(
        path.read_text().replace('"case_2_b", "case": "case_2", "text": "spleen"', '"case_2_b", "case": "case_2", "text": "milt"')
    )
    changed = json.loads(run(place, "--json").stdout)["datasets"][0]
    assert (changed["cases"]["done"], changed["cases"]["skipped"]) == (1, 2)
    assert rows_of(place)["case_2_b"].text == "milt"
    assert json.loads(run(place, "--detail", "full", "--json").stdout)["datasets"][0]["cases"]["done"] == 3


def test_parts_make_together_what_one_run_makes(place: Path) -> None:
    assert run(place).exit_code == 0
    whole = (place / "pre" / NAME / "traces.jsonl").read_bytes()
    shutil.rmtree(place / "pre" / NAME / "traces")
    assert run(place, "--num_parts", "2", "--part_id", "1").exit_code == 0
    header, rows = read_traces(place / "pre" / NAME / "traces.jsonl")
    assert (header["cases"], header["missing"], len(rows)) == (1, 2, 5)
    assert run(place, "--num_parts", "2", "--part_id", "0").exit_code == 0
    assert (place / "pre" / NAME / "traces.jsonl").read_bytes() == whole


def test_a_killed_run_keeps_what_is_finished_and_goes_on(place: Path) -> None:
    assert run(place).exit_code == 0
    whole = (place / "pre" / NAME / "traces.jsonl").read_bytes()
    cases = place / "pre" / NAME / "traces"
    shutil.rmtree(cases)
    code = (
        "import sys, time\nimport seerseg_data.traces as t\n"
        "for case in ('case_1', 'case_2', 'case_3'):\n"
        "    if case == 'case_2': print('second', flush=True); time.sleep(60)\n"
        "    from seerseg.cli.make_traces import make_traces as c\n"
        "    part = ['--num_parts', '3', '--part_id', str(int(case[-1]) - 1)]\n"
        f"    c.main(['-d', '7', '-np', '1', *part, '--raw_folder', {str(place / 'raw')!r},"
        f" '--preprocessed_folder', {str(place / 'pre')!r}], standalone_mode=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    while b"second" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (cases / ".tmp-left-case_2.jsonl").write_text("half a li")
    (cases / "case_3.jsonl").write_text('{"key": "of anoth')
    assert [p.name for p in sorted(cases.glob("case_*"))] == ["case_1.jsonl", "case_3.jsonl"]
    report = json.loads(run(place, "--json").stdout)["datasets"][0]
    assert (report["cases"]["done"], report["cases"]["skipped"]) == (2, 1)
    assert (place / "pre" / NAME / "traces.jsonl").read_bytes() == whole


def test_one_bad_case_ends_nothing_else(place: Path) -> None:
    (place / "pre" / NAME / "cases" / "case_2.b2nd").write_bytes(b"no case")
    done = run(place, "--json")
    assert done.exit_code == 3
    assert "case_2" in done.stderr
    assert {row.case for row in rows_of(place).values()} == {"case_1", "case_3"}
    assert list(json.loads(done.stdout)["datasets"][0]["cases"]["failed"]) == ["case_2"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"case": "case_9", "text": "liver", "target": "liver"}, "which Dataset007_Test does not hold"),
        ({"case": "case_1", "text": "liver", "target": "livre"}, "no label"),
        ({"case": "case_1", "text": "liver", "target": 7}, "'target' must be"),
        ({"id": "case_1_a", "case": "case_1", "text": "liver", "target": "liver"}, "already used"),
    ],
)
def test_a_bad_request_is_named_and_the_others_are_done(place: Path, line: dict[str, Any], says: str) -> None:
    with (place / "raw" / NAME / "requests.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    done = run(place)
    assert done.exit_code == 3
    assert says in done.stderr
    assert len(rows_of(place)) == 15


def test_what_is_missing_is_said(place: Path) -> None:
    (place / "raw" / NAME / "requests.jsonl").unlink()
    done = run(place)
    assert done.exit_code == 4
    assert "seerseg_make_requests" in done.stderr
    (place / "pre" / NAME / "plans.json").unlink()
    done = run(place)
    assert done.exit_code == 1
    assert "seerseg_plan_and_preprocess" in done.stderr
    assert run(place, "--num_parts", "2", "--part_id", "2").exit_code == 2
    assert run(place, "--check", "some").exit_code == 2


# ------------------------------------------------------------------------------------------------------------------ pieces


@given(hnp.arrays(np.bool_, st.tuples(st.integers(2, 6), st.integers(2, 7), st.integers(2, 8))), st.integers(0, 2))
def test_key_slices_say_where_the_mask_lies(mask: np.ndarray, axis: int) -> None:
    from skimage.measure import label

    spec = ViewSpec(plane=("axial", "coronal", "sagittal")[axis], count=3, lo=0.0, hi=1.0)  # type: ignore[arg-type]
    volume = Volume(np.zeros(mask.shape, np.int16), Grid(mask.shape, np.diag([1.0, 2.0, 3.0, 1.0])), "MR")
    scene = survey(volume, mask.astype(np.uint8) * 5, {"a": (5,)}, spec=spec)
    found = key_slices(scene, (5,))
    assert bool(found) == bool(mask.any())
    assert [s.axis for s in found][:3] == [0, 1, 2][: len(found)]
    for number, one in enumerate(found):
        plane = np.moveaxis(mask, one.axis, 0)[one.index]
        areas = np.moveaxis(mask, one.axis, 0).sum(axis=(1, 2))
        assert one.area == plane.sum()
        assert one.area == areas.max() if number < 3 else one.axis == axis and one.index in scene.shown and 2 * one.area >= areas.max()
        pieces = label(plane, connectivity=2)
        sizes = [int((pieces == n).sum()) for n in range(1, pieces.max() + 1)]
        assert len(one.boxes) == len(sizes)
        seen = []
        for box in one.boxes:
            crop = np.zeros_like(plane)
            crop[int(box.lo[0]) : int(box.hi[0]), int(box.lo[1]) : int(box.hi[1])] = True
            inside = {int(n) for n in np.unique(pieces[crop]) if n}
            fitting = [n for n in inside if _tight(pieces == n) == (*box.lo, *box.hi) and n not in seen]
            seen.append(max(fitting, key=lambda n: sizes[n - 1]))
        assert [sizes[n - 1] for n in seen] == sorted(sizes, reverse=True)
        assert len(one.points) == 2
        assert all(mask[p] and p[one.axis] == one.index for p in one.points)


def _tight(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(mask)
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


def test_two_points_are_the_middles_of_two_discs() -> None:
    plane = np.zeros((20, 40), bool)
    plane[2:17, 2:17] = True
    plane[5:12, 17:35] = True
    first, second = two_points(plane, (1.0, 1.0))
    assert first == (9, 9)
    assert 20 <= second[1] <= 32
    single = np.zeros((3, 3), bool)
    single[1, 1] = True
    assert two_points(single, (1.0, 1.0)) == ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("labels", "descriptions", "names"),
    [
        ({"Anterior": 1, "Posterior": 2}, None, ["anterior hippocampus", "posterior hippocampus"]),
        ({"kidney_left": 1, "kidney_right": 2}, None, ["left kidney", "right kidney"]),
        ({"L1": 1, "lung lesion x": 2}, {"L1": {"canonical": "vertebra L1"}}, ["vertebra L1", "lung lesion x"]),
        ({"spleen": 1, "lien": 2}, None, ["spleen", "lien"]),
    ],
)
def test_labels_get_whole_names(tmp_path: Path, labels: dict[str, int], descriptions: dict[str, Any] | None, names: list[str]) -> None:
    folder = make(tmp_path / "Dataset004_Hippocampus", ("a",), labels={"background": 0, **labels})
    if descriptions:
        (folder / "label_descriptions.json").write_text(json.dumps(descriptions))
    named = name_labels(open_dataset(folder))
    assert list(named.canonical.values()) == names
    if "kidney_left" in labels:
        assert named.answer(("kidney_right", "kidney_left")) == "kidneys"
    if "Anterior" in labels:
        assert named.answer(("Anterior", "Posterior")) == "hippocampus"


def test_styles_have_tags() -> None:
    tags = ["messy_or_misspelled", "ambiguous_abbreviation", "absent", "my typos", "by report", "something else"]
    wanted = [
        "MESSY_INPUT_REPAIR",
        "ABBR_DISAMBIGUATE",
        "OUT_OF_REGION_REJECT",
        "MESSY_INPUT_REPAIR",
        "REPORT_STYLE_PARSE",
        "PROMPT_NORMALIZE",
    ]
    assert [skill_tag(style) for style in tags] == wanted


def test_rationales_follow_from_how_requests_were_made(tmp_path: Path) -> None:
    def told(answer: str, style: str = "formal_task", **note: Any) -> str:
        return rationale(Request("r", "c", "text", ("x",), style), answer, (), "MR", {"slips": [], **note})[0]

    left = told("left lung", asked="left lung", surface="left lung", slips=["a:lung>lnug", "a:left>lft", "b:please>pls", "case_lower:"])
    assert left == "lnug -> lung, lft -> left; so left lung"
    assert told("left kidney", asked="left kidney", surface="LK") == "'LK' is short for left kidney"
    assert told("left kidney", asked="left kidney", surface="kidney") == "'kidney' on the left is left kidney"
    assert told("left kidney", asked="left kidney", surface="left renal organ") == "'left renal organ' means left kidney"
    assert (
        told("left kidney", "negated", asked="left kidney", surface="left kidney", template="a/train/1+not_sibling/train/2")
        == "what is left out leaves left kidney"
    )
    assert told("left kidney", asked="left kidney", surface="left kidney") == "named as it is: left kidney"
    assert told("absent", asked="spleen", surface="spleen") == "not in this scan: spleen"
    assert told("left kidney", asked="left kidney", surface="LK", slips=["a:x>y"], writer="m") == "named as it is: left kidney"
    (tmp_path / "r.jsonl").write_text('{"id": "a", "asked": "liver", "slips": [1, "a:b>c"]}\nnot json "asked"\n["asked"]\n')
    assert provenance(tmp_path / "r.jsonl") == {"a": {"asked": "liver", "slips": ["a:b>c"]}}
    assert provenance(tmp_path / "none.jsonl") == {}


def test_brief_traces_say_nothing_of_the_target_before_the_request_is_read(place: Path) -> None:
    assert run(place).exit_code == 0
    for row in rows_of(place).values():
        brief = row.trace.spoken(brief=True)
        assert (brief.answer, brief.slices, brief.turns) == (row.trace.answer, row.trace.slices, row.trace.turns)
        assert row.trace.answer not in brief.evidence
        assert "slice" not in brief.evidence
        assert row.trace.spoken(brief=False) == row.trace
    names = ("left lung", "right lung")
    note = {"asked": "left lung", "surface": "sinistral lung"}
    assert brief_rationale("left lung", names, note) == "sinistral lung: left lung"
    assert brief_rationale("left lung", names, {**note, "surface": "left lung"}) == "left lung"
    assert brief_rationale("left lung", names, {**note, "surface": "the one of the two that is not on the right"}) == "left lung"
    assert brief_rationale("absent", names, note) == "sinistral lung: left lung, not in this scan"
    assert brief_rationale("absent", names, {"asked": "liver", "surface": "liver"}) == "liver, not among the names"
    assert brief_rationale("absent", names, None) == "not in this scan"
    assert brief_rationale("left lung", names, {**note, "writer": "m"}) == "left lung"


def test_blank_views_have_the_geometry_of_the_views() -> None:
    from seerseg.views import render

    volume = Volume(np.zeros((9, 11, 13), np.int16), Grid((9, 11, 13), np.diag([1.0, 2.0, 3.0, 1.0])), "MR")
    for name in known_protocols():
        spec = load_protocol(name).view_spec
        shown, blank = render(volume, spec), blank_views(volume.grid, spec, "MR")
        assert [v.map for v in (*shown.views, *shown.others)] == [v.map for v in (*blank.views, *blank.others)]


def test_interrupted_case_files_do_not_count(place: Path) -> None:
    """Nothing but whole lines ever stands in traces.jsonl."""
    assert run(place).exit_code == 0
    path = place / "pre" / NAME / "traces.jsonl"
    before = path.stat().st_mtime_ns
    time.sleep(0.01)
    assert run(place, "--clean").exit_code == 0
    assert path.stat().st_mtime_ns > before
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert isinstance(rows_of(place)["case_1_a"].trace.slices[0], KeySlice)

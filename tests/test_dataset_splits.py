"""Splits: subjects never part, the committed split holds, and many processes that start together agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import raw_datasets as rd
from hypothesis import given
from hypothesis import strategies as st

from seerseg.dataset import Splits, load_or_make_splits, make_splits, open_dataset
from seerseg.errors import PlanError

COMMITTED = Path(__file__).parents[1] / "seerseg_data" / "splits" / "hippocampus.json"

subjects = st.dictionaries(
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=6), st.integers(1, 4), max_size=60
).map(lambda counts: {name: [f"{name}/{k}" for k in range(count)] for name, count in counts.items()})


@given(subjects=subjects, seed=st.integers(0, 5))
def test_subjects_never_part(subjects: dict[str, list[str]], seed: int) -> None:
    splits = make_splits(subjects, seed)
    subject_of = {case: name for name, cases in subjects.items() for case in cases}
    assert len(splits.folds) == 5
    if len(subjects) < 5:
        assert splits.test == ()
        assert all(set(f.train) == set(f.val) == set(subject_of) and f.bank == () for f in splits.folds)
        return
    validated: list[str] = []
    for fold in splits.folds:
        parts = [{subject_of[c] for c in part} for part in (splits.test, fold.train, fold.val, fold.bank)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(subjects)
        assert len(splits.test) + len(fold.train) + len(fold.val) + len(fold.bank) == len(subject_of)
        validated += fold.val
    assert sorted([*validated, *splits.test]) == sorted(subject_of)
    assert len({subject_of[c] for c in splits.test}) == max(1, round(0.2 * len(subjects)))


@given(subjects=subjects, order=st.randoms())
def test_splits_depend_on_neither_order_nor_machine(subjects: dict[str, list[str]], order: object) -> None:
    names = list(subjects)
    order.shuffle(names)  # type: ignore[attr-defined]
    assert make_splits({name: subjects[name] for name in names}) == make_splits(subjects)


@given(subjects=subjects)
def test_json_round_trip(subjects: dict[str, list[str]]) -> None:
    splits = make_splits(subjects)
    assert Splits.from_json(json.loads(json.dumps(splits.to_json()))) == splits


def test_the_committed_split_is_what_the_rule_makes(development_data: Path) -> None:
    dataset = open_dataset(development_data / "mr_hippocampus")
    assert make_splits(dataset.subjects) == Splits.from_json(json.loads(COMMITTED.read_text()))


def test_the_committed_split_keeps_neighbours_together() -> None:
    splits = Splits.from_json(json.loads(COMMITTED.read_text()))
    for fold in splits.folds:
        parts = [{(int(c.split("_")[1]) + 1) // 2 for c in part} for part in (splits.test, fold.train, fold.val, fold.bank)]
        assert sum(map(len, parts)) == len(set().union(*parts))


def toy(tmp_path: Path, count: int = 12) -> Path:
    folder = tmp_path / "Dataset001_Toy"
    rd.describe(folder, ["MRI"], {"background": 0, "liver": 1}, count)
    (folder / "imagesTr").mkdir()
    for number in range(count):
        (folder / "imagesTr" / f"c{number:02d}_0000.nii.gz").touch()
    (folder / "subjects.json").write_text(json.dumps({"twins": ["c00", "c01"]}))
    return folder


RACER = """
import sys, time
from pathlib import Path
from seerseg.dataset import load_or_make_splits, open_dataset
raw, out, gate = map(Path, sys.argv[1:4])
dataset = open_dataset(raw)
if int(sys.argv[4]) % 2:
    for name in list(dataset.subjects):
        dataset.subjects[name + "x"] = dataset.subjects.pop(name)
print("ready", flush=True)
while not gate.exists():
    time.sleep(0.001)
print(load_or_make_splits(dataset, out).to_json())
"""


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    """Half of them name subjects otherwise, so that they would write different files: one file must win for all."""
    raw, out, gate = toy(tmp_path), tmp_path / "out", tmp_path / "gate"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(raw), str(out), str(gate), str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in range(6)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    gate.touch()
    told = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 6, told
    assert len({text for text, _ in told}) == 1
    assert [path.name for path in out.iterdir()] == ["splits.json"]
    assert {str(Splits.from_json(json.loads((out / "splits.json").read_text())).to_json())} == {text.strip() for text, _ in told}


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    raw = toy(tmp_path)
    first = load_or_make_splits(open_dataset(raw), tmp_path / "out")
    before = (tmp_path / "out" / "splits.json").read_bytes()
    (raw / "imagesTr" / "c99_0000.nii.gz").touch()
    assert load_or_make_splits(open_dataset(raw), tmp_path / "out") == first
    assert (tmp_path / "out" / "splits.json").read_bytes() == before


def test_a_raw_splits_file_takes_the_place_of_the_rule(tmp_path: Path) -> None:
    raw = toy(tmp_path)
    given = {"schema": 1, "test": ["c02"], "folds": [{"train": ["c00", "c01", "c03"], "val": ["c04"]}]}
    (raw / "splits.json").write_text(json.dumps(given))
    splits = load_or_make_splits(open_dataset(raw), tmp_path / "out")
    assert (splits.test, splits.folds[0].train, splits.folds[0].bank) == (("c02",), ("c00", "c01", "c03"), ())
    given["test"] = ["c05"]
    (raw / "splits.json").write_text(json.dumps(given))
    with pytest.raises(PlanError, match=r"differ\. Remove the second"):
        load_or_make_splits(open_dataset(raw), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": 7}, "has schema version 7"),
        ({"folds": []}, "lacks a list of 'folds'"),
        ({"folds": [{"train": ["c03"]}]}, "fold 0, must give 'val'"),
        ({"test": ["c05", "c05"]}, "must give 'test' as a list of case ids, each once"),
        ({"test": ["elsewhere"]}, "names cases that Dataset001_Toy does not hold: elsewhere"),
        ({"test": ["c01"]}, r"fold 0: case 'c01' \(test\) is of the same subject as 'c00' \(train\), subject 'twins'"),
        ({"test": ["c03"]}, r"case 'c03' \(test\) is of the same subject as 'c03' \(train\)"),
        ({"folds": [{"train": ["c00", "c03"], "val": ["c01"]}]}, "subject 'twins'"),
    ],
)
def test_splits_that_must_not_be(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    raw = toy(tmp_path)
    splits = {"schema": 1, "test": ["c02"], "folds": [{"train": ["c00", "c03"], "val": ["c04"], "bank": ["c05"]}]}
    (raw / "splits.json").write_text(json.dumps({**splits, **change}))
    with pytest.raises(PlanError, match=sentence):
        load_or_make_splits(open_dataset(raw), tmp_path / "out")
    assert not (tmp_path / "out" / "splits.json").exists()


@given(data=st.binary(max_size=60))
def test_any_bytes_give_splits_or_a_sentence(tmp_path: Path, data: bytes) -> None:
    raw = toy(tmp_path) if not (tmp_path / "Dataset001_Toy").exists() else tmp_path / "Dataset001_Toy"
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "splits.json").write_bytes(data)
    with pytest.raises(PlanError, match=r"splits\.json"):
        load_or_make_splits(open_dataset(raw), tmp_path / "out")

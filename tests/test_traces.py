"""The trace file and masks as strings come back as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from seerseg.errors import DatasetError
from seerseg.prompts import Box2D, Point, Prompt
from seerseg.protocols.base import KeySlice, Trace, Turn
from seerseg.protocols.traces import TraceRow, read_traces, write_traces
from seerseg.volume import decode_runs, encode_runs

BOX = Box2D(0, 3, (1.0, 2.0), (5.0, 6.0))
ROW = TraceRow(
    "r1",
    "case",
    "outline the lft lung – “now”",
    ("left lung",),
    "messy",
    "train",
    Trace(
        "dark",
        "lft is left",
        "left lung",
        "MESSY_INPUT_REPAIR",
        (KeySlice(0, 3, 14, (BOX,), ((3, 2, 4), (3, 3, 3))),),
        (
            Turn(Prompt(boxes=(BOX,)), 0.8, encode_runs(np.ones((2, 3, 4), bool))),
            Turn(Prompt(points=(Point((1, 2, 3), False),)), 0.9),
            Turn(None, 0.9),
        ),
    ),
    {"image": "abc"},
)


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9)))
def test_runs_round_trip(mask: np.ndarray) -> None:
    assert np.array_equal(decode_runs(encode_runs(mask), mask.shape), mask)


@pytest.mark.parametrize("text", ["", "no base64 !", "AAAA", encode_runs(np.ones((3, 3, 3), bool))])
def test_runs_of_another_size_or_damaged_are_refused(text: str) -> None:
    with pytest.raises(DatasetError, match="stored mask"):
        decode_runs(text, (2, 2, 2))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_mask_or_a_sentence(data: bytes) -> None:
    import base64
    import zlib

    try:
        assert decode_runs(base64.b64encode(zlib.compress(data)).decode(), (2, 2, 2)).shape == (2, 2, 2)
    except DatasetError:
        pass


def test_traces_round_trip(tmp_path: Path) -> None:
    absent = TraceRow("r2", "case", "the spleen", None, "absent", "train", Trace("no spleen", "outside", "absent"))
    write_traces(tmp_path / "t.jsonl", {"dataset": "D"}, [ROW, absent])
    header, rows = read_traces(tmp_path / "t.jsonl")
    assert header == {"schema": 1, "kind": "seerseg_traces", "dataset": "D"}
    assert [r.to_json() for r in rows] == [ROW.to_json(), absent.to_json()]
    assert rows[0].trace.slices == ROW.trace.slices
    assert rows[0].trace.turns[0].prompt.boxes == (BOX,)
    assert rows[0].trace.turns[2].prompt is None


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "is no trace file"),
        (['{"id": "r1"}'], "is no trace file"),
        (['{"kind": "seerseg_traces", "schema": 9}'], "trace schema 9"),
        (['{"kind": "seerseg_traces", "schema": 1}', "{"], ":2: the line is not valid JSON"),
        (['{"kind": "seerseg_traces", "schema": 1}', '{"id": "r1"}'], ":2: the line is no trace"),
        (['{"kind": "seerseg_traces", "schema": 1}', json.dumps(ROW.to_json() | {"answer": ""})], ":2: the line is no trace"),
        (['{"kind": "seerseg_traces", "schema": 1}', "[]"], ":2: the line is no trace"),
    ],
)
def test_what_is_no_trace_file_gets_a_sentence(tmp_path: Path, lines: list[str], says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DatasetError, match=says):
        read_traces(path)


def test_missing_traces_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="seerseg_make_traces"):
        read_traces(tmp_path / "none.jsonl")

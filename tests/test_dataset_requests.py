"""Requests: any file becomes a list or a sentence, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.dataset import MAX_REQUEST_CHARS, Request, check_text, read_requests, scan_requests, write_requests
from seerseg.errors import RequestError


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_three_kinds_of_target(tmp_path: Path) -> None:
    path = written(
        tmp_path / "r.jsonl",
        '{"id": "a", "case": "c", "text": "plz outline the lft lung", "target": "left lung", "style": "messy", "language_split": "train"}',
        '{"id": "b", "case": "c", "text": "both lungs", "target": ["left lung", "right lung"], "reviewer": "kept out"}',
        "",
        '{"id": "c", "case": "c", "text": "spleen", "target": null}',
        '{"case": 7, "text": "unknown truth"}',
    )
    one, two, three, four = read_requests(path)
    assert one == Request("a", "c", "plz outline the lft lung", ("left lung",), "messy", "train")
    assert two.target == ("left lung", "right lung")
    assert three.absent
    assert three.has_target
    assert (four.id, four.case, four.has_target, four.absent) == ("line00005", "7", False, False)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"case": "c"}', "'text' is missing"),
        ('{"case": "c", "text": "x", "points": [[1, 2]]}', "'points' must be a list of voxels"),
        ('{"text": "liver"}', "'case' is missing"),
        ('{"case": "c", "text": 5}', "'text' must be a string"),
        ('{"case": "c", "text": "  \\u200b "}', "is empty"),
        (json.dumps({"case": "c", "text": "x" * 10_000}), "has 10000 characters"),
        ('{"case": "../c", "text": "liver"}', "'case' must be a name"),
        ('{"case": "c", "id": "a/b", "text": "liver"}', "'id' must be a name"),
        ('{"case": "c", "id": "\\ud800", "text": "liver"}', "'id' must be a name"),
        ('{"case": "c", "id": true, "text": "liver"}', "'id' must be a name"),
        ('{"case": "c", "text": "liver", "target": []}', "'target' must be"),
        ('{"case": "c", "text": "liver", "target": 3}', "'target' must be"),
        ('{"case": "c", "text": "liver", "style": 3}', "'style' must be a string"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    path = written(tmp_path / "r.jsonl", '{"case": "c", "text": "liver"}', line)
    with pytest.raises(RequestError, match=r"r\.jsonl:2: ") as caught:
        read_requests(path)
    assert sentence in str(caught.value)


def test_all_bad_lines_are_found(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", "{", '{"id": "a", "case": "c", "text": "liver"}', '{"id": "a", "case": "c", "text": "spleen"}')
    requests, faults = scan_requests(path)
    assert [r.text for r in requests] == ["liver"]
    assert len(faults) == 2
    assert "already used in line 2" in faults[1]
    with pytest.raises(RequestError, match="1 more lines"):
        read_requests(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        read_requests(tmp_path / "none.jsonl")
    with pytest.raises(RequestError, match="Cannot read"):
        read_requests(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"case": "c", "text": "f\xeamur"}\n'.encode("latin-1"))
    with pytest.raises(RequestError, match=r"latin.jsonl:1: the line is not UTF-8"):
        read_requests(tmp_path / "latin.jsonl")


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_bytes(b'\xef\xbb\xbf{"case": "c", "text": "liver"}\r\n{"case": "c", "text": "a\\r\\nb"}\r\n')
    assert [r.text for r in read_requests(tmp_path / "w.jsonl")] == ["liver", "a\nb"]


@given(data=st.binary(max_size=400))
def test_any_bytes_give_requests_or_a_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(data)
    requests, faults = scan_requests(path)
    assert all(isinstance(r, Request) for r in requests)
    assert all("any.jsonl:" in fault for fault in faults)
    assert len({r.id for r in requests}) == len(requests)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda v: st.lists(v, max_size=3), max_leaves=4
)


@given(line=st.fixed_dictionaries({}, optional={k: json_values for k in ("id", "case", "text", "target", "style", "language_split", "x")}))
def test_any_object_gives_a_request_or_a_sentence(tmp_path: Path, line: dict[str, object]) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text(json.dumps(line) + "\n")
    requests, faults = scan_requests(path)
    assert len(requests) + len(faults) == 1
    assert all("any.jsonl:1" in fault for fault in faults)
    for request in requests:
        assert request.text == check_text(request.text)
        request.text.encode("utf-8")


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="/\\"), min_size=1, max_size=20).filter(
    lambda n: n.strip(" .")
)


@given(
    rows=st.lists(
        st.tuples(names, names, st.none() | st.lists(names, min_size=1, max_size=3, unique=True), st.booleans()),
        max_size=5,
        unique_by=lambda r: r[0],
    )
)
def test_writing_and_reading_give_the_same(tmp_path: Path, rows: list[tuple[str, str, list[str] | None, bool]]) -> None:
    requests = [
        Request(
            name,
            case,
            "the liver, \u00e9\u4e2d\n\u2028please".replace("\u2028", ""),
            None if t is None or not known else tuple(t),
            "s",
            "",
            known,
        )
        for name, case, t, known in rows
        if t is None or all(n.strip() for n in t)
    ]
    write_requests(tmp_path / "w.jsonl", requests)
    assert read_requests(tmp_path / "w.jsonl") == requests


@given(text=st.text(max_size=60))
def test_checked_text_is_clean_and_stays_so(text: str) -> None:
    try:
        clean = check_text(text)
    except RequestError:
        return
    assert clean == clean.strip() != ""
    assert check_text(clean) == clean
    clean.encode("utf-8")
    assert not any(ord(c) < 32 and c != "\n" for c in clean)


def test_text_limits() -> None:
    assert check_text(" the  lft\tlung\r\n\n pls ") == "the lft lung\npls"
    assert check_text("e\u0301") == "\u00e9"
    assert len(check_text("x" * MAX_REQUEST_CHARS)) == MAX_REQUEST_CHARS
    with pytest.raises(RequestError, match=r"^Prompt 3 is empty"):
        check_text(" \u200d ", "Prompt 3")

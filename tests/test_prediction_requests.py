"""Where the requests of a case come from, and what a request that cannot be used does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.dataset import find_inputs
from seerseg.errors import RequestError
from seerseg.prediction.questions import Questions, gather, prompt_id


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "imagesTs"
    folder.mkdir()
    for name in ("a_0000.nii.gz", "b_0000.nii.gz", "c_0000.nii.gz"):
        (folder / name).touch()
    return folder


def texts(questions: Questions) -> dict[str, list[str]]:
    return {case: [r.text for r in asked.requests] for case, asked in questions.by_case.items()}


def lines(path: Path, *entries: object) -> Path:
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return path


def test_prompts_go_to_every_case(images: Path) -> None:
    asked = gather(find_inputs(images), prompts=["left lung", "the spine, please"])
    assert texts(asked) == {case: ["left lung", "the spine, please"] for case in "abc"}
    assert [r.id for r in asked.by_case["a"].requests] == ["1-left-lung", "2-the-spine-please"]
    assert not any(r.has_target for r in asked.by_case["a"].requests)


def test_a_requests_file_goes_by_case_and_joins_prompts(images: Path, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "r.jsonl",
        {"id": "x", "case": "a", "text": "liver", "target": "liver", "style": "lay"},
        {"id": "y", "case": "a", "text": "spleen", "target": None},
    )
    asked = gather(find_inputs(images), requests=path)
    assert texts(asked) == {"a": ["liver", "spleen"]}
    assert [(r.target, r.has_target, r.style) for r in asked.by_case["a"].requests] == [(("liver",), True, "lay"), (None, True, "")]
    assert texts(gather(find_inputs(images), requests=path, prompts=["aorta"]))["a"] == ["aorta", "liver", "spleen"]


def test_a_case_named_without_an_image_is_reported(images: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "r.jsonl", {"id": "x", "case": "aa", "text": "liver"}, {"id": "y", "case": "b", "text": "liver"})
    asked = gather(find_inputs(images), requests=path)
    assert len(asked.problems) == 1
    assert "1 case without an image in the input: aa. Did you mean a?" in asked.problems[0]
    assert gather(find_inputs(images / "b_0000.nii.gz"), requests=path).problems == ()


def test_files_beside_the_images(images: Path) -> None:
    (images / "a.txt").write_text("left lung\n\nright lung\n", encoding="utf-8")
    (images / "b_0000.json").write_text(json.dumps({"requests": ["liver", {"id": "r", "text": "spleen"}]}))
    (images / "c.json").write_text(json.dumps("aorta"))
    asked = gather(find_inputs(images))
    assert texts(asked) == {"a": ["left lung", "right lung"], "b": ["liver", "spleen"], "c": ["aorta"]}
    assert [r.id for r in asked.by_case["b"].requests] == ["1", "r"]
    assert texts(gather(find_inputs(images), prompts=["heart"])) == {case: ["heart"] for case in "abc"}


@pytest.mark.parametrize("beside", [True, False])
def test_the_datasets_own_requests(images: Path, beside: bool) -> None:
    folder = images if beside else images.parent
    lines(folder / "requests.jsonl", {"id": "x", "case": "a", "text": "liver"}, {"id": "y", "case": "train_1", "text": "liver"})
    (images / "b.txt").write_text("spleen")
    asked = gather(find_inputs(images))
    assert texts(asked) == {"b": ["spleen"], "a": ["liver"]}
    assert asked.problems == ()
    assert "1 other cases" in asked.notes[0]


def test_jobs_bring_their_own(images: Path) -> None:
    jobs = [{"image": "a_0000.nii.gz", "requests": ["liver", {"id": "k", "text": "spleen", "target": None}]}, {"image": "b_0000.nii.gz"}]
    path = images / "jobs.json"
    path.write_text(json.dumps(jobs))
    assert texts(gather(find_inputs(path))) == {"a": ["liver", "spleen"]}
    assert texts(gather(find_inputs(path), prompts=["aorta"])) == {"a": ["liver", "spleen", "aorta"], "b": ["aorta"]}


def test_a_bad_request_fails_alone(images: Path, tmp_path: Path) -> None:
    asked = gather(find_inputs(images), prompts=["liver", "", "x" * 10_000, "\x07\u200b", "spl\x00een\x1b"])
    assert texts(asked)["a"] == ["liver", "spleen"]
    reasons = [b.reason for b in asked.by_case["a"].bad]
    assert len(reasons) == 3
    assert "10000 characters" in reasons[1]
    assert all(len(b.text) <= 200 for b in asked.by_case["a"].bad)
    path = tmp_path / "r.jsonl"
    good = json.dumps({"id": "x", "case": "a", "text": "liver"}).encode()
    path.write_bytes(b"\n".join([good, b'{"id":"y","case":"b","text":"h\xe9patique"}', b"{", good, b'{"case":"b"}']))
    asked = gather(find_inputs(images), requests=path)
    assert texts(asked) == {"a": ["liver"]}
    assert [p.split(": ")[0].rsplit(":", 1)[-1] for p in asked.problems] == ["2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"h\xe9patique"), ("a.txt", b" \n"), ("a.json", b"{"), ("a.json", b"[]"), ("a.json", b"[7]")]
)
def test_a_bad_side_file_fails_its_case_alone(images: Path, name: str, content: bytes) -> None:
    (images / name).write_bytes(content)
    (images / "b.txt").write_text("liver")
    asked = gather(find_inputs(images))
    assert texts(asked) == {"a": [], "b": ["liver"]}
    assert len(asked.by_case["a"].bad) == 1


def test_the_same_id_twice_in_a_case(images: Path) -> None:
    (images / "a.json").write_text(
        json.dumps([{"id": "r", "text": "liver"}, {"id": "r", "text": "spleen"}, {"id": "../x", "text": "aorta"}])
    )
    asked = gather(find_inputs(images)).by_case["a"]
    assert [r.text for r in asked.requests] == ["liver"]
    assert [b.reason.split(" ")[0] for b in asked.bad] == ["The", "The"]


def test_a_requests_file_that_is_not_there(images: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        gather(find_inputs(images), requests=images / "none.jsonl")


@given(st.text(max_size=60))
def test_any_prompt_is_taken_or_refused_with_a_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("in")
    (folder / "a.nii.gz").touch()
    asked = gather(find_inputs(folder), prompts=[text]).by_case["a"]
    assert len(asked.requests) + len(asked.bad) == 1
    assert "/" not in prompt_id(1, text)


@given(st.binary(max_size=200))
def test_any_side_file_is_taken_or_refused_with_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("in")
    (folder / "a.nii.gz").touch()
    for name in ("a.json", "a.txt"):
        (folder / name).write_bytes(content)
        asked = gather(find_inputs(folder)).by_case["a"]
        assert asked.requests or asked.bad
        (folder / name).unlink()

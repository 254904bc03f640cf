"""Requests whose words nobody knows: which are changed, and how."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seerseg.vocabulary import Vocabulary

PATH = Path(__file__).resolve().parents[1] / "scripts" / "unknown_words.py"
SPEC = importlib.util.spec_from_file_location("unknown_words", PATH)
made = importlib.util.module_from_spec(SPEC)  # type: ignore[arg-type]
SPEC.loader.exec_module(made)  # type: ignore[union-attr]


def request(**more: Any) -> dict[str, Any]:
    return {
        "id": "r", "case": "a", "text": "please outline the hippocampal head", "target": "anterior hippocampus", "style": "chat",
        "language_split": "train", "asked": "anterior hippocampus", "surface": "hippocampal head", **more,
    }  # fmt: skip


def test_the_name_is_replaced_and_the_rest_stays() -> None:
    vocabulary = Vocabulary.load()
    found = [made.unknown(request(), random.Random(seed), vocabulary) for seed in range(40)]
    assert all(f["text"].startswith("please outline the ") and "hippocampal head" not in f["text"] for f in found)
    assert all(f["target"] == "anterior hippocampus" and f["surface"] in f["text"] for f in found)
    assert 20 < sum("hippocampus" in f["text"] for f in found) < 40, "mostly, the structure that it is a piece of is still named"
    alone = made.unknown(request(target="spleen", asked="spleen", surface="spleen", text="the spleen"), random.Random(0), vocabulary)
    assert "spleen" not in alone["text"]


@pytest.mark.parametrize(
    "more",
    [{"language_split": "val"}, {"language_split": "test"}, {"style": "label_prompt"}, {"target": None}, {"surface": "no such words"}],
)
def test_held_out_language_label_prompts_and_absent_targets_are_left_alone(more: dict[str, Any]) -> None:
    assert made.unknown(request(**more), random.Random(0), Vocabulary.load()) is None


def test_as_it_is_typed(tmp_path: Path) -> None:
    lines = [request(id=str(n)) for n in range(50)] + [request(id="v", language_split="val")]
    source, target = tmp_path / "requests.jsonl", tmp_path / "unknown.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(PATH), str(source), "-o", str(target), "--share", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    new = [json.loads(line) for line in target.read_text().splitlines()]
    changed = [a["id"] for a, b in zip(lines, new, strict=True) if a != b]
    assert f"{len(changed)} of 51 requests" in done.stdout
    assert 12 < len(changed) < 38
    assert "v" not in changed
    first = target.read_bytes()
    subprocess.run(command, capture_output=True, check=True)
    assert target.read_bytes() == first
    assert (
        "must be a requests.jsonl"
        in subprocess.run([*command[:2], str(tmp_path / "none"), *command[3:]], capture_output=True, text=True).stderr
    )

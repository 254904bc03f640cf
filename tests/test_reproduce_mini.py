"""The reproduction's table: per wording, then per case and target, absent targets apart."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from seerseg.dataset import Request
from seerseg.evolution.arena import Outcome

PATH = Path(__file__).resolve().parents[1] / "scripts" / "reproduce_mini.py"
SPEC = importlib.util.spec_from_file_location("reproduce_mini", PATH)
mini = importlib.util.module_from_spec(SPEC)  # type: ignore[arg-type]
SPEC.loader.exec_module(mini)  # type: ignore[union-attr]

DATASET = SimpleNamespace(subject_of={"a": "1", "b": "1", "c": "2"})


def outcome(request: Request, dice: float) -> Outcome:
    truth = (request.target or ("absent",))[0]
    return Outcome(request.case, request.id, request.text, truth, "", "MR", truth, dice, 1.0)


def row(name: str, scores: dict[tuple[str, str | None], list[float]]) -> dict:
    requests = [
        Request(f"{case}{target}{i}", case, "x", tuple(target.split("+")) if target else None)
        for (case, target), values in scores.items()
        for i, _ in enumerate(values)
    ]
    flat = [v for values in scores.values() for v in values]
    return mini.summary(name, [outcome(r, d) for r, d in zip(requests, flat, strict=True)], requests, DATASET, "none")


def test_a_row_by_hand() -> None:
    made = row("x", {("a", "liver"): [0.8, 0.4], ("b", "liver"): [1.0, 1.0], ("c", "liver"): [0.0, 0.6], ("a", None): [1.0, 0.0, 1.0]})
    assert (made["mean"], made["worst"]) == (pytest.approx((0.6 + 1.0 + 0.3) / 3), pytest.approx((0.4 + 1.0 + 0.0) / 3))
    assert made["std"] == pytest.approx((0.2 + 0 + 0.3) / 3)
    assert made["variance"] == pytest.approx((0.04 + 0 + 0.09) / 3)
    assert (made["n_cases"], made["n_requests"], made["n_absent"]) == (3, 6, 3)
    assert made["absent_right"] == pytest.approx(2 / 3)
    assert made["ci95"][0] <= made["mean"] <= made["ci95"][1]


def test_wholes_have_a_column_of_their_own() -> None:
    made = row("x", {("a", "liver"): [0.8, 0.4], ("a", "liver+spleen"): [0.1, 0.3]})
    assert (made["mean"], made["n_requests"]) == (pytest.approx(0.6), 2)
    assert (made["wholes_mean"], made["n_wholes"]) == (pytest.approx(0.2), 2)
    assert row("y", {("a", "liver"): [1.0]})["wholes_mean"] is None


def test_differences_are_paired_by_case_and_target() -> None:
    first = row("first", {("a", "liver"): [0.2, 0.4], ("c", "liver"): [0.5, 0.5]})
    second = row("second", {("a", "liver"): [0.6, 0.6], ("c", "liver"): [0.5, 0.9]})
    found = mini.paired({r["name"]: r["_scores"] for r in (first, second)}, "first", "second", DATASET.subject_of)
    assert found["worst"][0] == pytest.approx((0.4 + 0.0) / 2)
    assert found["std"][0] == pytest.approx((-0.1 + 0.2) / 2)


@pytest.mark.parametrize("controls", [(mini.FREE, mini.LEXICON), (mini.FREE, mini.LEXICON, mini.WHOLE)])
def test_every_row_is_compared_with_every_control_of_its_table(controls: tuple[str, ...]) -> None:
    rows = ["bank", "model", "both"]
    found = mini.compared(["label prompts", *controls, *rows])
    assert {(control, row) for control in controls for row in rows} <= set(found)
    assert {("bank", "model"), ("model", "both")} <= set(found)
    assert len(found) == len(set(found))
    assert not any("label prompts" in pair for pair in found)

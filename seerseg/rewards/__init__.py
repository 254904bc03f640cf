"""Rewards: terms by name, weighted in a small config; presets reproduce the four published systems.

    RewardConfig.from_json({"preset": "seer"})
    RewardConfig.from_json({"terms": {"dice": 1.0, "format": 0.1}, "stability": {"lambda": 0.5, "variant": "total"}})
    RewardConfig.from_json({"terms": {"dice": 1.0, "format": 0.1}, "turns": "dice"})

The stability penalty lies on one term and is taken over a paraphrase group, so it is applied where whole groups are at hand
(`seerseg.training.stability`); here it is a setting. SEER publishes neither its weights nor its lambda: those of the preset are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from seerseg.errors import PlanError, did_you_mean
from seerseg.rewards.terms import TERMS
from seerseg.rewards.truth import Attempt, Overlap, Truth, attempt_of, improving, key_slice

Variant = Literal["total", "between"]
MAX_LAMBDA = 0.5
CREDITED = ("dice", "iou", "agent/quality", "agent/quality_running")
"""Terms whose value after every turn follows from the masks so far, so that turns can be credited by them."""
_KEYS = ("preset", "terms", "stability", "clip", "turns")
_STABILITY_KEYS = ("lambda", "variant", "term")


@dataclass(frozen=True)
class Stability:
    """The penalty lam * Var over paraphrases on `term`. total: variance over paraphrases and samples together; between: of the
    paraphrases' means."""

    lam: float = 0.5
    variant: Variant = "total"
    term: str = "dice"

    def __post_init__(self) -> None:
        if not (isinstance(self.lam, int | float) and math.isfinite(self.lam) and 0 <= self.lam <= MAX_LAMBDA):
            raise PlanError(
                f"The stability weight lambda is {self.lam!r}; it must lie from 0 to {MAX_LAMBDA}, because a larger one can pay for making "
                "a good mask worse."
            )
        if self.variant not in get_args(Variant):
            raise PlanError(f"The stability variant {self.variant!r} is unknown; use {' or '.join(get_args(Variant))}.")
        if self.term not in TERMS:
            raise PlanError(f"The stability penalty is to lie on {self.term!r}, which is no reward term.{did_you_mean(self.term, TERMS)}")


@dataclass(frozen=True)
class RewardConfig:
    """Terms with their weights, summed, then kept within `clip` where that is given. turns: a term of `CREDITED`; a turn of a dialogue is
    then credited with what it and the turns after it add to that term, None: with the whole reward, as every other turn."""

    terms: Mapping[str, float]
    stability: Stability | None = None
    clip: tuple[float, float] | None = None
    turns: str | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise PlanError(f"The reward has no term. Name at least one of {', '.join(TERMS)} with a weight.")
        for name, weight in self.terms.items():
            if name not in TERMS:
                raise PlanError(f"There is no reward term {name!r}.{did_you_mean(name, TERMS)} Known: {', '.join(TERMS)}.")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise PlanError(f"The weight of the reward term {name!r} must be a number, not {weight!r}.")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise PlanError(f"The reward is to be kept within {self.clip}, which is no range; give [low, high] or null.")
        if self.stability is not None and self.terms.get(self.stability.term, 0.0) <= 0:
            raise PlanError(f"The stability penalty lies on {self.stability.term!r}, which has no weight in this reward; add that term.")
        if self.turns is not None and self.turns not in CREDITED:
            known = ", ".join(CREDITED)
            raise PlanError(f"Turns cannot be credited by {self.turns!r}, only by a term that each mask has a value of: {known}.")
        if self.turns is not None and self.turns not in self.terms:
            raise PlanError(f"Turns are to be credited by {self.turns!r}, which has no weight in this reward; add that term.")

    @classmethod
    def from_json(cls, value: Any) -> RewardConfig:
        """From a preset's name or an object with "preset" and/or "terms", "stability", "clip", "turns"; what is given replaces the
        preset's."""
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, Mapping):
            raise PlanError(f"A reward is the name of a preset or an object with {', '.join(_KEYS)}, not {value!r}.")
        _known(value, _KEYS, "reward")
        start = preset(value["preset"]) if "preset" in value else None
        terms = value.get("terms", start.terms if start else {})
        if not isinstance(terms, Mapping):
            raise PlanError(f"The reward's terms must be an object of names and weights, not {terms!r}.")
        stability, clip = (start.stability, start.clip) if start else (None, None)
        if "stability" in value:
            stability = _stability(value["stability"])
        elif stability is not None and stability.term not in terms:
            stability = None
        if "clip" in value:
            clip = _range(value["clip"])
        turns = value.get("turns", start.turns if start and start.turns in terms else None)
        return cls(dict(terms), stability, clip, turns)

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`."""
        s = self.stability
        return {
            "terms": dict(self.terms),
            "stability": None if s is None else {"lambda": s.lam, "variant": s.variant, "term": s.term},
            "clip": None if self.clip is None else list(self.clip),
            **({"turns": self.turns} if self.turns is not None else {}),
        }

    def values(self, attempt: Attempt, truth: Truth) -> dict[str, float]:
        """Every term by name, unweighted."""
        return {name: float(TERMS[name](attempt, truth)) for name in self.terms}

    def before_turns(self, attempt: Attempt, truth: Truth) -> tuple[float, ...]:
        """For each reply the weighted value of the term `turns` had the dialogue ended before it: 0 before the first mask, and all 0
        where turns are not credited."""
        if self.turns is None:
            return (0.0,) * len(attempt.replies)
        term, weight = TERMS[self.turns], self.terms[self.turns]
        drawn = [replace(attempt, overlaps=attempt.overlaps[:n], absent=False) for n in range(len(attempt.replies))]
        return tuple(weight * float(term(cut, truth)) if cut.overlaps else 0.0 for cut in drawn)

    def total(self, values: Mapping[str, float]) -> float:
        """The weighted sum of `values`, clipped; without the stability penalty."""
        said = sum(weight * values[name] for name, weight in self.terms.items())
        return said if self.clip is None else min(max(said, self.clip[0]), self.clip[1])


def _equal(*names: str) -> dict[str, float]:
    return dict.fromkeys(names, 1.0)


def _quarter(axial: str, spatial: str) -> dict[str, float]:
    return dict.fromkeys(("medvol/format", axial, spatial, "medvol/consistency"), 0.25)


def _kits(axial: str, spatial: str) -> dict[str, float]:
    return {"medvol/format": 0.30, spatial: 0.35, axial: 0.35}


_UNIT = (0.0, 1.0)
_R = "medreasoner/"
_ALWAYS = (f"{_R}think", f"{_R}answer")
_HARD = (f"{_R}box_align", f"{_R}box_scale", f"{_R}points_align", f"{_R}points_angle")
_MENDED_R = (f"{_R}box_iou_mended", f"{_R}points_dice_mended")
_OWN = ("medvol/axial_global", "medvol/spatial_own_slice")
PRESETS: dict[str, RewardConfig] = {
    "seer": RewardConfig({"dice": 1.0, "format": 0.1}, Stability()),
    "seer/between": RewardConfig({"dice": 1.0, "format": 0.1}, Stability(variant="between")),
    "medvol-r1/ctorg": RewardConfig(_quarter("medvol/axial", "medvol/spatial"), clip=_UNIT),
    "medvol-r1/ctorg/mended": RewardConfig(_quarter(*_OWN), clip=_UNIT),
    "medvol-r1/kits23": RewardConfig(_kits("medvol/axial", "medvol/spatial"), clip=_UNIT),
    "medvol-r1/kits23/mended": RewardConfig(_kits(*_OWN), clip=_UNIT),
    "medreasoner/soft": RewardConfig(_equal(*_ALWAYS, f"{_R}box_iou", f"{_R}points_dice")),
    "medreasoner/soft/mended": RewardConfig(_equal(*_ALWAYS, *_MENDED_R)),
    "medreasoner/hard": RewardConfig(_equal(*_ALWAYS, f"{_R}box_iou", f"{_R}points_dice", *_HARD)),
    "medreasoner/hard/mended": RewardConfig(_equal(*_ALWAYS, *_MENDED_R, *_HARD)),
    "medsam-agent": RewardConfig({"agent/format": 0.2, "agent/quality": 0.8}),
    "medsam-agent/mended": RewardConfig({"agent/format": 0.2, "agent/quality_running": 0.8}),
    "medsam-agent/turns": RewardConfig({"agent/format": 0.2, "agent/quality_running": 0.8}, turns="agent/quality_running"),
}
"""Published rewards under their names, with their defects; "/mended" repairs those, "/turns" also credits turns one by one
(documentation/rewards.md)."""


def preset(name: Any) -> RewardConfig:
    """The preset of that name; PlanError with the known names otherwise."""
    if not isinstance(name, str) or name not in PRESETS:
        raise PlanError(f"There is no reward preset {name!r}.{did_you_mean(str(name), PRESETS)} Known: {', '.join(PRESETS)}.")
    return PRESETS[name]


def _stability(value: Any) -> Stability | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise PlanError(f"The reward's stability must be null or an object with {', '.join(_STABILITY_KEYS)}, not {value!r}.")
    _known(value, _STABILITY_KEYS, "stability")
    default = Stability()
    return Stability(value.get("lambda", default.lam), value.get("variant", default.variant), value.get("term", default.term))


def _range(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(v, int | float) for v in value):
        raise PlanError(f"The reward's clip must be null or [low, high], not {value!r}.")
    return float(value[0]), float(value[1])


def _known(value: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
    for key in value:
        if key not in keys:
            raise PlanError(f"A {what} has no setting {key!r}.{did_you_mean(str(key), keys)} It has {', '.join(keys)}.")


__all__ = [
    "CREDITED",
    "MAX_LAMBDA",
    "PRESETS",
    "TERMS",
    "Attempt",
    "Overlap",
    "RewardConfig",
    "Stability",
    "Truth",
    "Variant",
    "attempt_of",
    "improving",
    "key_slice",
    "preset",
]

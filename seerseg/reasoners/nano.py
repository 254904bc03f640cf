"""`nano`: a small vision-language reasoner whose weights lie in the package. A default to start from, not a clinical tool.

It is an ordinary model folder of the Qwen3-VL architecture with its own tokeniser, read by the same code as any other; only its card
differs. Sources, data and measurements: `seerseg/weights/nano_reasoner/MODEL_CARD.md`; recipe: `scripts/train_nano_reasoner.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from seerseg.errors import ModelError
from seerseg.reasoners.base import ReasonerCard
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.reasoners.vlm_loading import find
from seerseg.reasoners.vlm_loading import load as load_model

SHIPPED = Path(__file__).resolve().parents[1] / "weights" / "nano_reasoner"
LICENCE = "CC-BY-SA-4.0"
_MAX_NEW_TOKENS = 96  # its longest replies have about half of that
_MAX_BATCH = 48


class NanoReasoner(VlmReasoner):
    """The shipped weights, or others that were trained from them."""

    @cached_property
    def card(self) -> ReasonerCard:
        """That of any model, under this name."""
        shipped = self.loaded.source.folder == SHIPPED and self.loaded.source.adapter is None
        return replace(
            super().card,
            name="nano",
            licence=LICENCE,
            source="shipped with seerseg" if shipped else str(self.loaded.source.adapter or self.loaded.source.folder),
            notes="Small, trained on generated requests and few scans. Not for clinical use. See MODEL_CARD.md.",
        )


def load(
    *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True, **decoding: Any
) -> NanoReasoner:
    """The shipped reasoner, or that of a folder of the same kind. decoding: fields of `Decoding`."""
    unknown = sorted(set(decoding) - set(Decoding.__dataclass_fields__))
    if unknown:
        raise ModelError(f"The reasoner nano has no setting {unknown[0]!r}; it has {', '.join(Decoding.__dataclass_fields__)}.")
    settings = {"max_new_tokens": _MAX_NEW_TOKENS, "max_batch": _MAX_BATCH, **decoding}
    return NanoReasoner(load_model(find(source or SHIPPED, offline=offline), device=device, dtype=dtype), Decoding(**settings))

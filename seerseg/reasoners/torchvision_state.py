"""Whether torchvision is there and works. With a CPU build of torch, the registry's torchvision breaks transformers at import;
transformers only looks whether the distribution exists, so absent is fine and broken is not."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Literal

TorchvisionState = Literal["absent", "ok", "broken"]
BROKEN_ADVICE = (
    "torchvision is installed but cannot be imported with this torch, and that breaks transformers. "
    "Remove it with: pip uninstall torchvision. SeerSeg does not need it."
)


@cache
def torchvision_state() -> TorchvisionState:
    """Found out once, by importing torchvision (never transformers) where it is installed."""
    return probe("torchvision")


def probe(package: str) -> TorchvisionState:
    """ "absent", "ok" or "broken": what becomes of `import package`."""
    if importlib.util.find_spec(package) is None:
        return "absent"
    try:
        importlib.import_module(package)
    except Exception:  # a broken build raises RuntimeError, OSError or ImportError, and all mean the same here
        return "broken"
    return "ok"

"""A reasoner whose replies are given: the public double for tests of everything that needs one.

ScriptedReasoner(["reply 1", "reply 2"])          replies in order, the last one again and again
ScriptedReasoner({"left lung": "reply"})          by request text; key "*" for any other
ScriptedReasoner(lambda dialogue, sample: "...")  computed
load_reasoner("scripted:replies.json")            a JSON list or object of the first two kinds
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seerseg.errors import ModelError
from seerseg.paths import read_json
from seerseg.protocols.messages import Message
from seerseg.reasoners.base import ReasonerCard

Script = Sequence[str] | Mapping[str, str | Sequence[str]] | Callable[[Sequence[Message], int], str]
_REQUEST = re.compile(r"<raw_prompt>(.*?)</raw_prompt>", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of `reply`."""

    dialogues: tuple[tuple[Message, ...], ...]
    samples: int
    seed: int


class ScriptedReasoner:
    """Replies from a script; `calls` records what it was asked.

    A list is used up over the life of the reasoner: sample after sample, dialogue after dialogue; its last reply repeats.
    In a mapping the value may be a list: sample i gets its i-th reply (the last when fewer).
    """

    def __init__(self, script: Script, *, name: str = "scripted") -> None:
        if not callable(script) and not script:
            raise ModelError("A scripted reasoner needs at least one reply.")
        self.calls: list[Call] = []
        self._script = script
        self._next = 0
        said = "callable" if callable(script) else json.dumps(script, sort_keys=True, ensure_ascii=False)
        self.card = ReasonerCard(
            name=name, identity=f"scripted-{hashlib.sha256(said.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}", sees_images=False
        )

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """The script's replies; `seed` changes nothing."""
        self.calls.append(Call(tuple(tuple(d) for d in dialogues), samples, seed))
        return [[self._one(dialogue, sample) for sample in range(samples)] for dialogue in dialogues]

    def _one(self, dialogue: Sequence[Message], sample: int) -> str:
        if callable(self._script):
            return self._script(dialogue, sample)
        if isinstance(self._script, Mapping):
            found = self._script.get(_request(dialogue), self._script.get("*", ""))
            return found if isinstance(found, str) else found[min(sample, len(found) - 1)] if found else ""
        reply = self._script[min(self._next, len(self._script) - 1)]
        self._next += 1
        return reply


def _request(dialogue: Sequence[Message]) -> str:
    text = next((m.text for m in dialogue if m.role == "user"), "")
    found = _REQUEST.findall(text)
    return found[-1] if found else text


def load(*, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True) -> ScriptedReasoner:
    """From a JSON file: a list of replies, or an object of request text -> reply or list of replies."""
    if source is None:
        raise ModelError("The scripted reasoner needs a file of replies: scripted:FILE.json.")
    data = read_json(Path(source).expanduser(), ModelError)
    listed = isinstance(data, list) and all(isinstance(r, str) for r in data)
    mapped = isinstance(data, dict) and all(
        isinstance(v, str) or (isinstance(v, list) and v and all(isinstance(r, str) for r in v)) for v in data.values()
    )
    if not (listed or mapped) or not data:
        raise ModelError(f"{source} must hold a list of replies, or an object of request text -> reply (or list of replies).")
    return ScriptedReasoner(data)

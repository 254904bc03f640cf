"""SEER's grammar: slices, then instruction, then what may be answered, skills and the request; evidence, rationale and
a normalised name back.

The order is SEER's (arXiv 2603.08215, released code): system, user = images, instruction, optional skill block, request
block. Instruction texts are our own. A list of the names that may be answered is our addition, left out when any may.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from seerseg.prompts import Prompt
from seerseg.protocols.base import ABSENT, Answer, Fault, Trace
from seerseg.protocols.messages import Message, Part, TextPart, image_of, text_message
from seerseg.skills.base import Skill
from seerseg.views import SEER_VIEWS, CaseViews, ViewSpec
from seerseg.volume import Mask

SYSTEM = (
    "You turn a clinician's free-text request about a 3D scan into one short, standard anatomical name that a "
    "segmentation model can execute. Look at the slices first: what is shown, which region, which side. Repair spelling, "
    "resolve abbreviations by what the scan shows, keep the side exactly as meant, drop everything that is not the target. "
    f"If the target is not in this scan, answer {ABSENT}.\n"
    "Reply with exactly these three parts, in this order, and nothing else:\n"
    "<evidence>what the slices and the words show</evidence>"
    "<rationale>how the request leads to the answer</rationale>"
    f"<answer>the name, or {ABSENT}</answer>"
)
SKILL_RULE = (
    "Some skills that worked before follow. If one fits this request, use it and name its id in the rationale; "
    "ignore those that do not fit."
)
MAX_ANSWER_CHARS = 200
_PARTS = ("evidence", "rationale", "answer")
_WHOLE = re.compile(
    r"\s*<evidence>(?P<evidence>[^<]*)</evidence>\s*<rationale>(?P<rationale>[^<]*)</rationale>\s*<answer>(?P<answer>[^<]*)</answer>\s*"
)


class SeerProtocol:
    """One turn; the answer is text."""

    name = "seer"
    max_turns = 1
    prompt_kinds = frozenset({"text"})
    view_spec: ViewSpec = SEER_VIEWS

    def opening(self, views: CaseViews, request: str, skills: Sequence[Skill], targets: Sequence[str]) -> list[Message]:
        """System and one user message: images, instruction, names, skills, request."""
        parts: list[Part] = [image_of(view) for view in views.views]
        parts.append(TextPart(self._instruction(views)))
        if targets:
            parts.append(TextPart(f"<targets>{'; '.join((*targets, ABSENT))}</targets>"))
        if skills:
            listed = "\n".join(f"[{i}] {s.id} ({s.tag}) when: {inert(s.when)} do: {inert(s.what)}" for i, s in enumerate(skills, start=1))
            parts.append(TextPart(f"{SKILL_RULE}\n<skill_bank>\n{listed}\n</skill_bank>"))
        parts.append(TextPart(f"<raw_prompt>{inert(request)}</raw_prompt>"))
        return [text_message("system", SYSTEM), Message("user", tuple(parts))]

    def read(self, reply: str, views: CaseViews) -> Answer | Fault:
        """The answer, wherever its tag stands; Fault when there is none, it is empty or it is no name."""
        found = {part: last_between(reply, part) for part in _PARTS}
        answer = found["answer"]
        if answer is None:
            return Fault("The reply has no <answer>...</answer>.")
        answer = " ".join(answer.split())
        if not answer:
            return Fault("The reply's answer is empty.")
        if len(answer) > MAX_ANSWER_CHARS or "<" in answer or ">" in answer:
            return Fault("The reply's answer is not a name.")
        evidence, rationale = ((found[part] or "").strip() for part in ("evidence", "rationale"))
        if normalise_name(answer) == ABSENT:
            return Answer(target=None, prompt=None, evidence=evidence, rationale=rationale, absent=True)
        return Answer(target=answer, prompt=Prompt(text=answer), evidence=evidence, rationale=rationale)

    def targets(self, trace: Trace, views: CaseViews) -> tuple[str, ...]:
        """The reply of an SFT sample; it reads back as the trace's answer."""
        said = {part: inert(getattr(trace, part)) for part in _PARTS}
        return ("".join(f"<{part}>{said[part]}</{part}>" for part in _PARTS),)

    def observe(self, mask: Mask | None, views: CaseViews) -> Message | None:
        """Nothing: SEER has one turn."""
        return None

    def wellformed(self, reply: str) -> float:
        """1 for exactly the three parts in order, none empty; otherwise half the share of parts that can be read."""
        whole = _WHOLE.fullmatch(reply)
        if whole is not None and all(whole[part].strip() for part in _PARTS):
            return 1.0
        return 0.5 * sum(bool((last_between(reply, part) or "").strip()) for part in _PARTS) / len(_PARTS)

    def _instruction(self, views: CaseViews) -> str:
        spec, count = views.spec, len(views.views)
        way = {"axial": "from inferior to superior", "coronal": "from posterior to anterior", "sagittal": "from left to right"}[spec.plane]
        side = "" if spec.plane == "sagittal" else ", the patient's right on the left of the image"
        what = f"{views.modality} scan" if views.modality else "scan of unknown modality"
        return f"These are {count} {spec.plane} slices of one {what}, {way}{side}. Name the structure that the request asks for."


def inert(text: str) -> str:
    """Text that cannot be mistaken for a tag of the grammar."""
    return text.replace("<", "‹").replace(">", "›")


def normalise_name(name: str) -> str:
    """Case, underscores, spacing and outer punctuation do not make another name."""
    return " ".join(name.replace("_", " ").casefold().split()).strip(" .,;:'\"!")


def last_between(reply: str, part: str) -> str | None:
    """The text of the last complete <part>...</part>: a reasoner that corrects itself means the last one."""
    end = reply.rfind(f"</{part}>")
    start = reply.rfind(f"<{part}>", 0, end) if end >= 0 else -1
    return reply[start + len(part) + 2 : end] if start >= 0 else None

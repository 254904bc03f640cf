"""What a request can sound like: the styles, SEER's eight and more, and the values that pass between the modules of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seerseg.skills.base import DEFAULT_TAG, TAG_OF_STYLE

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Style:
    """A way of asking. families: the sentences it is put into; seer: whether it
    is one of SEER's eight; absent: whether its target is never in the scan."""

    name: str
    families: tuple[str, ...]
    about: str
    seer: bool = False
    absent: bool = False

    @property
    def skill_tag(self) -> str:
        """The tag of what it takes to read it."""
        return TAG_OF_STYLE.get(self.name, DEFAULT_TAG)


_PLAIN = ("clinical", "casual", "formal", "order", "report", "chat")
STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style("label_prompt", (), "the canonical name itself"),
        Style("clinical_request", ("clinical",), "how a colleague asks", True),
        Style("abbr_or_short", ("terse",), "an abbreviation or a clipped name", True),
        Style("messy_or_misspelled", ("casual", "terse"), "typed in haste, a slip or two", True),
        Style("verbose_request", ("verbose",), "a letter with much beside the point", True),
        Style("report_style", ("report",), "a line of a report or a note", True),
        Style("formal_task", ("formal",), "a task as a protocol states it", True),
        Style(
            "ambiguous_abbreviation",
            ("terse", "casual", "clinical"),
            "an abbreviation that means other things elsewhere, one thing in this scan",
            True,
        ),
        Style("implicit", ("implicit", "clinical", "casual"), "by what it does or is like, not by its name"),
        Style("relational", ("clinical", "casual", "formal", "chat"), "by where it lies beside something else"),
        Style("negated", ("clinical", "casual", "formal", "chat"), "by what it is not"),
        Style("mixed_case", ("clinical", "casual", "formal"), "odd capitals and punctuation"),
        Style("keyboard_slips", ("casual", "clinical", "terse"), "several slips of the keyboard"),
        Style("speech_to_text", ("speech",), "dictated, as the recogniser heard it"),
        Style("chat", ("chat",), "a message to a colleague"),
        Style("order_form", ("order",), "an entry of an order form"),
        Style(
            "out_of_region_reference",
            (*_PLAIN, "terse"),
            "a structure of another part of the body",
            True,
            True,
        ),
        Style("absent", (*_PLAIN, "terse"), "a structure that this scan could show and does not", False, True),
    )
}
PARAPHRASE_STYLES: tuple[str, ...] = tuple(name for name, style in STYLES.items() if not style.absent)
"""The order in which a paraphrase set takes its styles; a set of 16 has each once."""
FALLBACK_STYLES = ("clinical_request", "chat", "formal_task", "report_style", "order_form", "keyboard_slips", "verbose_request")
"""In the place of a style that cannot apply to a target (no abbreviation is known, say), in this order."""


@dataclass(frozen=True)
class Context:
    """What the request is about beside its target. modality: "CT", "MR" or None; region: of the body, or None; names: canonical
    names that the dataset has, all of which may be answered; unsided: the scan does not say which side it shows, so no request
    may say one."""

    modality: str | None = None
    region: str | None = None
    names: tuple[str, ...] = ()
    unsided: bool = False


@dataclass(frozen=True)
class Wording:
    """A request's text and all that it was made from. surface: the words for the target as the vocabulary has them (the canonical
    name may be said in any split); template: "family/split/number", joined by "+" where a phrase was put into a sentence; slips:
    "kind:what became of what"."""

    text: str
    style: str
    split: str
    surface: str
    template: str
    slips: tuple[str, ...] = ()

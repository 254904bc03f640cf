"""The loop: every way a request can end, one batch for a case, several turns with a session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.episode import Dialogue, Targets, open_dialogues, reason, solve
from seerseg.errors import FolderError, ModelError, UsageError
from seerseg.model import Model, ModelSpec, find_run, open_model, read_spec, resolve_device, run_name, write_spec
from seerseg.prompts import Point, Prompt
from seerseg.protocols.base import Answer, Fault
from seerseg.protocols.messages import Message, text_message
from seerseg.protocols.seer import SeerProtocol
from seerseg.reasoners.base import ReasonerCard
from seerseg.segmenters.base import Capabilities, ModelCard, Segmentation
from seerseg.skills.base import Query, Skill
from seerseg.views import CaseViews, ViewSpec, render
from seerseg.vocabulary import LabelDescription
from seerseg.volume import Grid, Mask, Volume

VOLUME = Volume(np.zeros((6, 5, 4), np.int16), Grid((6, 5, 4), np.eye(4)), modality="CT")
VIEWS = render(VOLUME, ViewSpec(size_px=16))


def said(answer: str) -> str:
    return f"<evidence>e</evidence><rationale>r</rationale><answer>{answer}</answer>"


class Teller:
    """A reasoner that answers a request by a table, each time with the next reply."""

    card = ReasonerCard(name="teller", identity="teller-1")

    def __init__(self, table: dict[str, list[str]]) -> None:
        self.table, self.calls = {k: list(v) for k, v in table.items()}, []

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        self.calls.append((len(dialogues), seed))
        out = []
        for dialogue in dialogues:
            first = next(m for m in dialogue if m.role == "user").text
            request = first[first.rindex("<raw_prompt>") + 12 : first.rindex("</raw_prompt>")]
            out.append([self.table[request].pop(0)])
        return out


class Painter:
    """A segmenter of a few names that counts its calls; its session paints clicked voxels."""

    def __init__(self, *, session: bool = False) -> None:
        self.calls: list[int] = []
        self.closed = 0
        self.capabilities = Capabilities(text="open", points=True, session=session, presence=True)
        self.card = ModelCard(name="painter", identity="painter-1")

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        self.calls.append(len(prompts))
        return [self._one(volume, prompt) for prompt in prompts]

    def _one(self, volume: Volume, prompt: Prompt) -> Segmentation:
        mask = np.zeros(volume.grid.shape_zyx, bool)
        if prompt.text == "unknown":
            return Segmentation(prompt, "unsupported", message="It does not know that.", nearest=("liver",))
        if prompt.text in ("ghost", "faint"):
            return Segmentation(prompt, "empty", Mask(mask, volume.grid), presence=0.1 if prompt.text == "ghost" else 0.9)
        mask[1] = True
        return Segmentation(prompt, "ok", Mask(mask, volume.grid), presence=0.9)

    def session(self, volume: Volume) -> PaintSession:
        return PaintSession(self, volume)


class PaintSession:
    def __init__(self, painter: Painter, volume: Volume) -> None:
        self.painter, self.volume = painter, volume
        self.mask = np.zeros(volume.grid.shape_zyx, bool)

    def add(self, prompt: Prompt) -> Segmentation:
        for point in prompt.points:
            self.mask[tuple(int(v) for v in point.zyx)] = point.positive
        return Segmentation(prompt, "ok", Mask(self.mask.copy(), self.volume.grid))

    def undo(self) -> None:
        return None

    def close(self) -> None:
        self.painter.closed += 1


class Clicker:
    """A protocol of three turns: "z y x" clicks, anything else stops."""

    name = "clicker"
    max_turns = 3
    prompt_kinds = frozenset({"points"})
    view_spec = ViewSpec(size_px=16)

    def opening(self, views: CaseViews, request: str, skills: Sequence[Skill], targets: Sequence[str]) -> list[Message]:
        return [text_message("user", f"<raw_prompt>{request}</raw_prompt>")]

    def read(self, reply: str, views: CaseViews) -> Answer | Fault:
        parts = reply.split()
        if len(parts) != 3:
            return Answer(target="it", prompt=None, done=True)
        z, y, x = (float(v) for v in parts)
        return Answer(target="it", prompt=Prompt(points=(Point((z, y, x)),)), done=False)

    def targets(self, trace: object, views: CaseViews) -> tuple[str, ...]:
        return ("",)

    def observe(self, mask: Mask | None, views: CaseViews) -> Message | None:
        return text_message("user", f"{int(mask.array.sum()) if mask else 0} voxels")

    def wellformed(self, reply: str) -> float:
        return 1.0


def test_every_ending_and_one_call_per_case() -> None:
    table = {
        "a": [said("liver")],
        "b": [said("absent")],
        "c": [said("ghost")],
        "d": [said("faint")],
        "e": [said("unknown")],
        "f": ["gibberish", "more gibberish"],
        "g": ["gibberish", said("liver")],
    }
    teller, painter = Teller(table), Painter()
    episodes = solve(VIEWS, VOLUME, list(table), protocol=SeerProtocol(), reasoner=teller, segmenter=painter)
    assert [e.status for e in episodes] == ["ok", "absent", "absent", "empty", "unsupported", "fault", "ok"]
    assert [e.absent_by for e in episodes] == [None, "reasoner", "segmenter", None, None, None, None]
    assert [e.mask is None for e in episodes] == [False, False, False, False, True, True, False]
    assert painter.calls == [5]  # one call: the image is encoded once
    assert teller.calls == [(7, 0), (2, 1)]  # what could not be read is asked again, once, with another seed
    assert episodes[5].replies == ("gibberish", "more gibberish")
    assert episodes[4].nearest == ("liver",)
    for episode in episodes:
        assert episode.to_json()["status"] == episode.status
        assert episode.message or episode.status == "ok"


def test_closed_targets_refuse_other_names_and_open_ones_keep_them() -> None:
    names = ("Left Kidney", "liver")
    closed, opened = Targets(names, closed=True), Targets(names)
    assert closed.resolve("left_kidney.") == "Left Kidney"
    assert closed.resolve("spleen") is None
    assert opened.resolve("spleen") == "spleen"
    dialogue = Dialogue(VIEWS, "x", SeerProtocol(), targets=closed)
    assert dialogue.step(said("spleen"))
    assert dialogue.fault is not None
    assert "spleen" in dialogue.fault.reason
    dialogue = Dialogue(VIEWS, "x", SeerProtocol(), targets=closed)
    dialogue.step(said("left kidney"))
    assert dialogue.pending is not None
    assert dialogue.pending.text == "Left Kidney"


@given(st.text())
def test_a_reply_may_be_any_string(reply: str) -> None:
    episodes = solve(VIEWS, VOLUME, ["q"], protocol=SeerProtocol(), reasoner=Teller({"q": [reply, reply]}), segmenter=Painter())
    assert len(episodes) == 1


def test_skills_are_shown_and_their_use_is_recorded() -> None:
    class Bank:
        identity = "bank-1"
        mode = "frozen"

        def retrieve(self, query: Query, limit: int) -> Sequence[Skill]:
            return (Skill("s:1", "TAG", "always", "answer liver"),) if query.text == "a" else ()

    replies = {"a": [said("liver").replace(">r<", ">by s:1<")], "b": [said("liver")]}
    one, two = solve(VIEWS, VOLUME, ["a", "b"], protocol=SeerProtocol(), reasoner=Teller(replies), segmenter=Painter(), bank=Bank())
    assert one.skills_shown == ("s:1",)
    assert one.answer is not None
    assert one.answer.skills == ("s:1",)
    assert two.skills_shown == ()


def test_several_turns_share_one_session_and_it_is_closed() -> None:
    teller = Teller({"q": ["1 1 1", "2 2 2", "stop"], "r": ["0 0 0", "3 3 3", "4 4 3"]})
    painter = Painter(session=True)
    q, r = solve(VIEWS, VOLUME, ["q", "r"], protocol=Clicker(), reasoner=teller, segmenter=painter)
    assert q.mask is not None
    assert int(q.mask.array.sum()) == 2
    assert r.mask is not None
    assert int(r.mask.array.sum()) == 3
    assert painter.closed == 2
    assert len(q.replies) == len(r.replies) == 3


def test_dialogues_can_be_driven_from_outside() -> None:
    (dialogue,) = open_dialogues(VIEWS, ["q"], protocol=SeerProtocol())
    reason([dialogue], Teller({"q": [said("liver")]}))
    assert dialogue.done
    assert dialogue.pending is not None
    assert [m.role for m in dialogue.messages] == ["system", "user", "assistant"]


def test_manifest_round_trip(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    spec = ModelSpec(
        reasoner=str(tmp_path / "adapter"),
        targets=("a", "b"),
        closed=True,
        label_values={"a": (1,), "b": (2, 3)},
        views=ViewSpec(count=4),
        descriptions={"a": LabelDescription("anterior hippocampus", ("hippocampal head",), "brain")},
        folder=tmp_path,
    )
    write_spec(tmp_path, spec)
    assert '"reasoner": "adapter"' in (tmp_path / "manifest.json").read_text()
    assert read_spec(tmp_path) == spec
    assert open_model(tmp_path, segmenter="grow").spec.segmenter == "grow"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"schema": 1}', '{"schema": 2}', '{"schema": 1, "reasoner": "../../x", "segmenter": "nano", "protocol": "seer"}'],
)
def test_a_damaged_manifest_is_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match=r"manifest\.json"):
        read_spec(tmp_path)


def test_a_segmenter_that_cannot_take_the_protocols_answers_is_refused() -> None:
    class BoxOnly(Painter):
        def __init__(self) -> None:
            super().__init__()
            self.capabilities = Capabilities(box2d=True)

    model = Model(ModelSpec(), segmenter_given=BoxOnly())
    with pytest.raises(ModelError, match="text"):
        _ = model.segmenter
    other = Model(ModelSpec(segmenter_identity="painter-0"), segmenter_given=Painter())
    with pytest.raises(ModelError, match="identity"):
        _ = other.segmenter


def test_runs_are_found_and_never_guessed(tmp_path: Path) -> None:
    root = tmp_path / "Dataset004_Hippocampus"
    one = run_name("plans", "seer", "org/Model", "nano")
    assert "/" not in one
    write_spec(root / one / "fold_0", ModelSpec())
    assert find_run(tmp_path, "4", 0) == root / one / "fold_0"
    write_spec(root / run_name("plans", "seer", "other", "nano") / "fold_0", ModelSpec())
    with pytest.raises(UsageError, match="Several"):
        find_run(tmp_path, "4", 0)
    assert find_run(tmp_path, "4", 0, hints={"reasoner": "org/Model"}) == root / one / "fold_0"
    with pytest.raises(ModelError, match="fold 1"):
        find_run(tmp_path, "4", 1)
    with pytest.raises(FolderError):
        find_run(tmp_path, "5", 0)


def test_devices() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cpu", "cuda", "mps")
    for name in ("gpu", "cuda:99", "cpu:x"):
        with pytest.raises(UsageError, match="device"):
            resolve_device(name)


def test_the_lexicon_is_told_what_the_labels_mean() -> None:
    spec = ModelSpec(targets=("L1", "L2"), closed=True, descriptions={"L1": LabelDescription("anterior hippocampus", ("seahorse front",))})
    model = Model(spec, segmenter_given=Painter())
    (episode,) = solve(
        VIEWS,
        VOLUME,
        ["outline the seahorse front"],
        protocol=SeerProtocol(),
        reasoner=model.reasoner,
        segmenter=Painter(),
        targets=model.targets,
    )
    assert episode.target == "L1"


def test_a_pair_may_be_answered_where_both_sides_are_listed() -> None:
    both = Targets(("left lung", "right lung", "liver"), closed=True)
    assert both.resolve("lungs") == "lungs"
    assert both.resolve("Both lungs") == "lungs"
    assert Targets(("left lung", "liver"), closed=True).resolve("lungs") is None
    assert both.resolve("kidneys") is None
    assert both.resolve("left lung") == "left lung"


class Halves(Painter):
    """Draws a slice for each name by its length, and nothing of some."""

    def _one(self, volume: Volume, prompt: Prompt) -> Segmentation:
        found = super()._one(volume, prompt)
        if found.mask is None or found.status == "empty":
            return found
        array = np.zeros(volume.grid.shape_zyx, bool)
        array[0 if prompt.text == "anterior hippocampus" else 4] = True
        return Segmentation(prompt, "ok", Mask(array, volume.grid), presence=0.6, seconds=1.0)


PARTS = Targets(("Anterior hippocampus", "posterior hippocampus"), closed=True)


def test_a_whole_is_drawn_as_its_listed_pieces() -> None:
    halves = Halves()
    teller = Teller({"all of it": [said("Hippocampus")], "the head": [said("anterior hippocampus")]})
    whole, head = solve(
        VIEWS, VOLUME, ["all of it", "the head"], protocol=SeerProtocol(), reasoner=teller, segmenter=Split(halves), targets=PARTS
    )
    assert (whole.status, whole.target, whole.presence) == ("ok", "hippocampus", 0.6)
    assert whole.mask is not None
    assert whole.mask.name == "hippocampus"
    assert sorted({int(z) for z in np.nonzero(whole.mask.array)[0]}) == [0, 4]
    assert "Drawn as its pieces: Anterior hippocampus, posterior hippocampus." in whole.message
    assert head.mask is not None
    assert sorted({int(z) for z in np.nonzero(head.mask.array)[0]}) == [0]
    assert halves.calls == [3], "one call for all of a case"


class Split:
    """Names in lower case for `Halves`."""

    def __init__(self, halves: Halves) -> None:
        self._halves, self.capabilities, self.card = halves, halves.capabilities, halves.card

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        return [
            replace(s, prompt=p)
            for s, p in zip(self._halves.segment(volume, [replace(p, text=str(p.text).casefold()) for p in prompts]), prompts, strict=True)
        ]


def test_what_is_a_whole_of_the_listed_names() -> None:
    assert PARTS.resolve("hippocampal formation") == "hippocampus"
    assert PARTS.pieces("hippocampus") == ("Anterior hippocampus", "posterior hippocampus")
    assert PARTS.pieces("anterior hippocampus") == ()
    assert Targets(("anterior hippocampus",), closed=True).resolve("hippocampus") is None
    assert Targets(("anterior hippocampus", "posterior hippocampus")).pieces("hippocampus") == (), "an open list is no list of pieces"
    assert Targets(("hippocampus", "anterior hippocampus"), closed=True).pieces("hippocampus") == ()
    both = Targets(("left lung", "right lung"), closed=True)
    assert both.pieces("lungs") == (), "segmenters take pairs by their own word"


@pytest.mark.parametrize(("listed", "status"), [("unknown", "unsupported"), ("ghost", "ok")])
def test_a_piece_that_cannot_be_drawn_spoils_the_whole_and_an_empty_one_does_not(listed: str, status: str) -> None:
    class Odd(Painter):
        def _one(self, volume: Volume, prompt: Prompt) -> Segmentation:
            return super()._one(volume, replace(prompt, text=listed if prompt.text == "posterior hippocampus" else prompt.text))

    targets = Targets(("anterior hippocampus", "posterior hippocampus"), closed=True)
    teller = Teller({"all": [said("hippocampus")]})
    (episode,) = solve(VIEWS, VOLUME, ["all"], protocol=SeerProtocol(), reasoner=teller, segmenter=Odd(), targets=targets)
    assert (episode.status, episode.target) == (status, "hippocampus")
    assert (episode.mask is None) == (status == "unsupported")


def test_a_dialogue_of_several_turns_is_about_one_listed_name() -> None:
    class Naming(Clicker):
        def read(self, reply: str, views: CaseViews) -> Answer | Fault:
            return Answer(target="hippocampus", prompt=Prompt(text="hippocampus"), done=True)

    dialogue = Dialogue(VIEWS, "q", Naming(), targets=PARTS)
    assert dialogue.step("anything")
    assert dialogue.fault is not None

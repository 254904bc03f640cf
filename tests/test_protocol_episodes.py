"""Whole episodes of every protocol: from a script of replies to masks, through the loop and through the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from PIL import Image
from protocol_contract import replies, trace_of, volume_of

from seerseg.cli.predict import predict
from seerseg.episode import Dialogue, Episode, Targets, conclude, draw, finish, open_dialogues, solve
from seerseg.errors import SegmenterError
from seerseg.prediction import Predictor
from seerseg.prompts import Prompt
from seerseg.protocols import BUILT_IN, load_protocol
from seerseg.protocols.base import Trace
from seerseg.protocols.combined import AGREES_FROM
from seerseg.reasoners.scripted import ScriptedReasoner
from seerseg.segmenters.base import Capabilities, ModelCard, RefiningSession, Segmentation, Segmenter, Session, answered, refusal
from seerseg.segmenters.grow import GrowSegmenter
from seerseg.segmenters.scripted import ScriptedSegmenter
from seerseg.views import CaseViews, ViewSpec, render
from seerseg.volume import Grid, Volume

SHAPE, SPACING = (16, 40, 44), (4.0, 2.0, 2.0)
NAMES = ("left ball", "right ball")
PAINTER = ScriptedSegmenter({})  # fills boxes, adds and removes balls
SPATIAL = tuple(name for name in BUILT_IN if name != "seer")


def ball(centre: Sequence[float], radius_mm: float) -> np.ndarray:
    z, y, x = (((np.arange(n) - c) * s) ** 2 for n, c, s in zip(SHAPE, centre, SPACING, strict=True))
    return z[:, None, None] + y[None, :, None] + x[None, None, :] <= radius_mm**2


LEFT, RIGHT = ball((8, 20, 10), 15.0), ball((8, 18, 33), 15.0)  # the last axis runs to the patient's right


@lru_cache(maxsize=1)
def scan() -> Volume:
    rng = np.random.default_rng(0)
    array = rng.normal(0, 8, SHAPE) + 200 * (LEFT | RIGHT)
    return Volume(array.astype(np.int16), Grid(SHAPE, np.diag([*SPACING[::-1], 1.0])), modality="CT")


@lru_cache(maxsize=8)
def shown(name: str) -> CaseViews:
    spec = load_protocol(name).view_spec
    return render(scan(), ViewSpec(size_px=128, count=6, also=spec.also))


@lru_cache(maxsize=8)
def taught(name: str, mask_name: str = "left ball") -> tuple[str, ...]:
    """The SFT targets of that protocol for one of the balls."""
    mask = LEFT if mask_name == "left ball" else RIGHT
    return load_protocol(name).targets(trace_of(mask, 0, name=mask_name), shown(name))


def dice(episode: Episode, truth: np.ndarray) -> float:
    assert episode.mask is not None
    return 2 * np.count_nonzero(episode.mask.array & truth) / (np.count_nonzero(episode.mask.array) + np.count_nonzero(truth))


def run(name: str, said: Sequence[str], segmenter: Segmenter, **more: object) -> Episode:
    reasoner = ScriptedReasoner(list(said))
    (episode,) = solve(shown(name), scan(), ["the left one"], protocol=load_protocol(name), reasoner=reasoner, segmenter=segmenter, **more)  # type: ignore[arg-type]
    assert json.loads(json.dumps(episode.to_json()))["status"] == episode.status
    return episode


class Limited:
    """A segmenter of words, points and boxes as told, without sessions; its masks are those of the scripted one."""

    def __init__(self, capabilities: Capabilities, masks: dict[str, np.ndarray] | None = None) -> None:
        self.capabilities = capabilities
        self.card = ModelCard("limited", "limited-1")
        self.asked: list[Prompt] = []
        self._inner = ScriptedSegmenter(masks or {"left ball": LEFT | RIGHT, "right ball": RIGHT})

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        self.asked += prompts
        refused = [refusal("limited", self.capabilities, volume, prompt) for prompt in prompts]
        return [r or self._inner.segment(volume, [p])[0] for r, p in zip(refused, prompts, strict=True)]

    def session(self, volume: Volume) -> Session:
        raise SegmenterError("limited has no sessions.")


# -------------------------------------------------------------------------------------------------- the expert's replies


@pytest.mark.parametrize("name", SPATIAL)
def test_the_experts_replies_find_the_target_with_grow(name: str) -> None:
    episode = run(name, taught(name), GrowSegmenter())
    assert episode.status == "ok", episode.message
    assert dice(episode, LEFT) > 0.9
    assert episode.mask is not None
    assert episode.mask.name == ("left ball" if name == "seerseg" else "the left one")
    assert len(episode.replies) == (3 if name == "medsam-agent" else 1)
    assert "box2d" in episode.drawn_from or name == "medsam-agent"


@pytest.mark.parametrize("name", [n for n in BUILT_IN if n != "medsam-agent"])
def test_many_requests_of_a_case_are_one_call(name: str) -> None:
    texts = {"the left one": taught(name)[0], "the other": taught(name, "right ball")[0]}
    segmenter = ScriptedSegmenter({"left ball": LEFT, "right ball": RIGHT})
    reasoner = ScriptedReasoner(texts)
    left, right = solve(shown(name), scan(), list(texts), protocol=load_protocol(name), reasoner=reasoner, segmenter=segmenter)
    assert len(segmenter.calls) == len(reasoner.calls) == 1
    assert left.mask is not None
    assert right.mask is not None
    assert left.mask.array[:, :, :22].sum() > 0 == left.mask.array[:, :, 22:].sum()
    assert right.mask.array[:, :, 22:].sum() > 0 == right.mask.array[:, :, :22].sum()


@pytest.mark.parametrize("name", BUILT_IN)
def test_absent(name: str) -> None:
    segmenter = GrowSegmenter() if name in SPATIAL else ScriptedSegmenter({"left ball": LEFT})
    episode = run(name, load_protocol(name).targets(Trace("e", "r", "absent"), shown(name)), segmenter)
    assert (episode.status, episode.absent_by) == ("absent", "reasoner")
    assert episode.mask is not None
    assert not episode.mask.array.any()


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=15)
@given(reply=replies)
def test_any_reply_ends_an_episode(name: str, reply: str) -> None:
    assert run(name, [reply], ScriptedSegmenter({"left ball": LEFT})).status in ("ok", "absent", "empty", "unsupported", "fault")


def test_a_reply_that_cannot_be_read_is_asked_for_again() -> None:
    reasoner = ScriptedReasoner(["what?", taught("medvol-r1")[0]])
    (episode,) = solve(shown("medvol-r1"), scan(), ["q"], protocol=load_protocol("medvol-r1"), reasoner=reasoner, segmenter=GrowSegmenter())
    assert episode.status == "ok"
    assert [c.seed for c in reasoner.calls] == [0, 1]


# ------------------------------------------------------------------------------------------------------- several turns


def drawn_dialogue(said: Sequence[str], segmenter: Segmenter, **more: object) -> tuple[Dialogue, Episode]:
    protocol = load_protocol("medsam-agent")
    dialogue = Dialogue(shown("medsam-agent"), "the left one", protocol, **more)  # type: ignore[arg-type]
    (episode,) = finish([dialogue], scan(), reasoner=ScriptedReasoner(list(said)), segmenter=segmenter)
    return dialogue, episode


def test_the_mask_is_shown_between_turns_and_earlier_images_stay() -> None:
    dialogue, _ = drawn_dialogue(taught("medsam-agent"), PAINTER)
    assert [m.role for m in dialogue.messages] == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    opening = open_dialogues(dialogue.views, ["the left one"], protocol=dialogue.protocol)[0].messages
    assert [i.key for i in dialogue.messages[1].images] == [i.key for i in opening[1].images]
    for message in (dialogue.messages[3], dialogue.messages[5]):
        assert len(message.images) == 3
        assert all((i.pixels[..., 1].astype(int) - i.pixels[..., 0] > 60).any() for i in message.images)


def test_masks_of_every_turn_are_kept_where_they_are_needed() -> None:
    kept, episode = drawn_dialogue(taught("medsam-agent"), PAINTER, keep_masks=True)
    assert [t.mask is not None for t in kept.turns] == [True, True]
    assert len(episode.turns) == 2
    light, _ = drawn_dialogue(taught("medsam-agent"), PAINTER)
    assert [t.mask for t in light.turns] == [None, None]
    assert [t["status"] for t in episode.to_json()["turns"]] == ["ok", "ok"]


@pytest.mark.parametrize("last", ["I am done.", "<tool_call>{", taught("medsam-agent")[0].replace("add_bbox", "add_circle")])
def test_a_reply_that_cannot_be_read_ends_the_episode_and_the_mask_stands(last: str) -> None:
    reasoner = ScriptedReasoner([taught("medsam-agent")[0], last])
    (episode,) = solve(
        shown("medsam-agent"), scan(), ["q"], protocol=load_protocol("medsam-agent"), reasoner=reasoner, segmenter=GrowSegmenter()
    )
    assert len(reasoner.calls) == 2  # nothing is asked twice
    assert episode.status == "ok"
    assert "ended at reply 2" in episode.message
    assert dice(episode, LEFT) > 0.9
    assert run("medsam-agent", [last], GrowSegmenter()).status == "fault"


def test_endless_turns_end() -> None:
    episode = run("medsam-agent", [taught("medsam-agent")[0]], PAINTER)
    assert len(episode.replies) == 5
    assert len(episode.turns) == 5
    assert episode.status == "ok"


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


THERE = {"view": "axial", "slice": 8}
BOX, CLICK, STOP = (reply[reply.index("<tool_call>") :] for reply in taught("medsam-agent"))
CORNER = {**THERE, "point_2d": [120, 120]}
BAD: dict[str, tuple[list[str], str, str, int]] = {
    "coordinates outside": ([BOX, call("add_point", **THERE, point_2d=[5000, 5], point_type="positive")], "ok", "outside of the slice", 1),
    "swapped corners": ([call("add_bbox", **THERE, bbox_2d=[900, 900, 100, 100])], "fault", "x1 < x2", 0),
    "no area": ([BOX, call("add_bbox", **THERE, bbox_2d=[300, 300, 300, 500])], "ok", "x1 < x2", 1),
    "a slice that is not there": ([BOX, call("add_bbox", view="axial", slice=99, bbox_2d=[1, 1, 9, 9])], "ok", "slices 0 to 15", 1),
    "a click on nothing": ([BOX, call("add_point", **CORNER, point_type="negative"), STOP], "ok", "", 2),
    "only a click on nothing": ([call("add_point", **CORNER, point_type="negative"), STOP], "empty", "", 1),
    "a call inside prose": ([f"First I draw a box. {BOX} Is it right?", f"Yes. {STOP} Done."], "ok", "", 1),
    "two calls at once": ([BOX + CLICK, STOP], "ok", "", 1),
    "a call and a stop at once": ([BOX + STOP], "ok", "", 1),
    "endless turns": ([BOX, *[CLICK] * 9], "ok", "", 5),
    "a reply that ends in the middle": ([BOX, CLICK[:60]], "ok", "no tool call", 1),
    "no reply at all": ([""], "fault", "no tool call", 0),
    "another tool": ([BOX, call("erase", **THERE)], "ok", "no tool 'erase'", 1),
    "arguments that are none": ([BOX, '<tool_call>{"name": "add_point", "arguments": [1, 2]}</tool_call>'], "ok", "names no slice", 1),
    "huge numbers": ([BOX, call("add_bbox", **THERE, bbox_2d=[10**400, 1, 2, 3])], "ok", "four numbers", 1),
    "stop at once": ([STOP], "absent", "stopped before anything", 0),
}


@pytest.mark.parametrize("segmenter", [GrowSegmenter(), PAINTER], ids=["grow", "scripted"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_an_outcome_and_is_told(name: str, segmenter: Segmenter) -> None:
    said, status, message, turns = BAD[name]
    _, episode = drawn_dialogue(said, segmenter)
    assert len(episode.turns) == turns
    assert message in episode.message
    assert episode.status in (status, *(["unsupported"] if name == "only a click on nothing" else []))
    assert len(episode.replies) <= 5
    record = json.loads(json.dumps(episode.to_json()))
    assert record["replies"] == list(episode.replies)
    if status == "ok":
        assert dice(episode, LEFT) > (0.9 if isinstance(segmenter, GrowSegmenter) else 0.0)
    if name == "a click on nothing":
        assert record["turns"][0]["status"] == "ok"


class Failing(GrowSegmenter):
    """Fails or refuses at a turn."""

    def __init__(self, at: int, *, raises: bool) -> None:
        self.at, self.raises, self.open = at, raises, 0

    def session(self, volume: Volume) -> Session:  # type: ignore[override]
        failing, inner = self, RefiningSession(GrowSegmenter(), volume)
        self.open += 1

        class Turns:
            count = 0

            def add(self, prompt: Prompt) -> Segmentation:
                self.count += 1
                if self.count != failing.at:
                    return inner.add(prompt)
                if failing.raises:
                    raise SegmenterError("The device is out of memory.")
                return Segmentation(prompt, "unsupported", message="Not this click.")

            def undo(self) -> Segmentation | None:
                return inner.undo()

            def close(self) -> None:
                failing.open -= 1

        return Turns()


@pytest.mark.parametrize("raises", [True, False])
def test_a_segmenter_that_fails_between_turns_leaves_the_mask_and_the_reasoner_is_told(raises: bool) -> None:
    segmenter = Failing(2, raises=raises)
    box, click, stop = taught("medsam-agent")
    dialogue, episode = drawn_dialogue([box, click, click, stop], segmenter)
    assert episode.status == "ok"
    assert dice(episode, LEFT) > 0.9
    assert [t.status for t in episode.turns] == ["ok", "unsupported", "ok"]
    assert "changed nothing" in dialogue.messages[5].text
    assert segmenter.open == 0
    _, episode = drawn_dialogue([box, click + stop], Failing(2, raises=raises))
    assert "last action changed nothing" in episode.message
    _, episode = drawn_dialogue([box, stop], Failing(1, raises=raises))
    assert episode.status == "unsupported"


def test_a_segmenter_without_sessions_is_given_the_mask_before_or_all_that_was_asked() -> None:
    box, click, stop = taught("medsam-agent")
    plain = Limited(Capabilities(box2d=True, points=True))
    _, episode = drawn_dialogue([box, click, click, box, stop], plain)
    assert episode.status == "ok"
    assert [(len(p.boxes), len(p.points)) for p in plain.asked] == [(1, 0), (1, 1), (1, 2), (1, 2)]
    masked = Limited(Capabilities(box2d=True, points=True, previous_mask=True))
    drawn_dialogue([box, click, stop], masked)
    assert [sorted(p.kinds) for p in masked.asked] == [["box2d"], ["mask", "points"]]


# ------------------------------------------------------------------------------------------------------ name and anchor


def test_a_text_backbone_is_given_the_name_and_the_anchor_selects() -> None:
    words = Limited(Capabilities(text="closed", vocabulary=NAMES))  # its "left ball" is both balls
    episode = run("seerseg", taught("seerseg"), words)
    assert [p.kinds for p in words.asked] == [{"text"}]
    assert episode.drawn_from == ("text",)
    assert episode.agreement is not None
    assert (episode.agreement.dropped, episode.agreement.agrees) == (1, True)
    assert dice(episode, LEFT) == 1.0
    assert "taken away" in episode.message
    assert episode.to_json()["agreement"]["score"] > 0.9
    assert words._inner._masks["left ball"].sum() == (LEFT | RIGHT).sum()  # type: ignore[union-attr]


def test_a_box_backbone_is_given_the_anchor_and_the_name_is_checked() -> None:
    episode = run("seerseg", taught("seerseg"), GrowSegmenter(), targets=Targets(NAMES, closed=True))
    assert episode.drawn_from == ("box2d",)
    assert episode.target == "left ball"
    assert episode.agreement is not None
    assert episode.agreement.score > 0.7
    other = run("seerseg", [taught("seerseg")[0].replace("left ball", "spleen")], GrowSegmenter(), targets=Targets(NAMES, closed=True))
    assert other.status == "fault"
    assert "spleen" in other.message


def test_disagreement_is_said() -> None:
    wrong = taught("seerseg")[0].replace("left ball", "right ball")  # the anchor is round the left one
    episode = run("seerseg", [wrong], Limited(Capabilities(text="open")))
    assert episode.status == "ok"
    assert episode.agreement is not None
    assert episode.agreement.score < AGREES_FROM
    assert "disagree" in episode.message
    assert "says right" in episode.message


def test_a_name_without_an_anchor() -> None:
    said = "<evidence>e</evidence><rationale>r</rationale><answer>left ball</answer>"
    episode = run("seerseg", [said], Limited(Capabilities(text="open")))
    assert episode.status == "ok"
    assert episode.agreement is None
    assert "no anchor" in episode.message
    assert run("seerseg", [said], GrowSegmenter()).status == "unsupported"


def test_other_protocols_are_never_narrowed() -> None:
    words = Limited(Capabilities(text="open"))
    assert run("medvol-r1", taught("medvol-r1"), words).status == "unsupported"
    assert words.asked[0].kinds == {"box2d"}
    half = Limited(Capabilities(box2d=True))
    assert run("medreasoner", taught("medreasoner"), half).status == "unsupported"


def test_a_second_reading_where_the_first_disagrees() -> None:
    wrong, right = taught("seerseg")[0].replace("left ball", "right ball"), taught("seerseg")[0]
    words = Capabilities(text="open")
    masks = {"left ball": LEFT, "right ball": RIGHT}
    once = run("seerseg", [wrong, right], Limited(words, masks))
    assert once.target == "right ball"
    twice = run("seerseg", [wrong, right], Limited(words, masks), second_reading=True)
    assert (twice.target, dice(twice, LEFT)) == ("left ball", 1.0)
    assert twice.replies == (wrong, right)
    for second in ("what?", wrong, "<answer>absent</answer>"):
        kept = run("seerseg", [wrong, second], Limited(words, masks), second_reading=True)
        assert (kept.target, kept.status) == ("right ball", "ok")
        assert kept.mask is not None
        assert np.array_equal(kept.mask.array, RIGHT)
    sure = ScriptedReasoner([right])
    solve(
        shown("seerseg"),
        scan(),
        ["q"],
        protocol=load_protocol("seerseg"),
        reasoner=sure,
        segmenter=Limited(words, masks),
        second_reading=True,
    )
    assert len(sure.calls) == 1


def test_masks_shared_between_requests_are_not_changed() -> None:
    """Two anchors on one shared mask, as a segmenter that answers equal prompts once gives it."""

    class Shared(Limited):
        def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
            made = answered(volume, prompts[0], LEFT | RIGHT)
            return [made for _ in prompts]

    protocol = load_protocol("seerseg")
    texts = (taught("seerseg")[0], taught("seerseg", "right ball")[0])
    dialogues = open_dialogues(shown("seerseg"), ["a", "b"], protocol=protocol)
    for dialogue, reply in zip(dialogues, texts, strict=True):
        dialogue.step(reply)
    draw(dialogues, scan(), Shared(Capabilities(text="open")))
    left, right = (conclude(d, scan()) for d in dialogues)
    assert (dice(left, LEFT), dice(right, RIGHT)) == (1.0, 1.0)


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scan as NIfTI, in an orientation that is not ours."""
    root = tmp_path_factory.mktemp("stored")
    image = nib.Nifti1Image(scan().array.transpose(2, 1, 0), np.diag([*SPACING[::-1], 1.0]))
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("PIL"))
    image.as_reoriented(change).to_filename(root / "ball.nii.gz")
    truth = nib.Nifti1Image(LEFT.astype(np.uint8).transpose(2, 1, 0), np.diag([*SPACING[::-1], 1.0]))
    truth.as_reoriented(change).to_filename(root / "truth.nii.gz")
    return root


@pytest.mark.parametrize("name", SPATIAL)
def test_the_command_line_takes_every_protocol(name: str, stored: Path, tmp_path: Path) -> None:
    protocol = load_protocol(name)
    views = render(scan(), protocol.view_spec)
    (tmp_path / "replies.json").write_text(json.dumps(list(protocol.targets(trace_of(LEFT, 0, name="left ball"), views))))
    done = CliRunner().invoke(
        predict,
        [
            *("-i", str(stored / "ball.nii.gz"), "-o", str(tmp_path / "out"), "--prompt", "the left one", "-device", "cpu"),
            *("--protocol", name, "--reasoner", f"scripted:{tmp_path / 'replies.json'}", "--segmenter", "grow"),
        ],
    )
    assert done.exit_code == 0, done.output
    drawn, truth = (np.asanyarray(nib.load(path).dataobj) > 0 for path in (tmp_path / "out" / "ball.nii.gz", stored / "truth.nii.gz"))
    assert 2 * (drawn & truth).sum() / (drawn.sum() + truth.sum()) > 0.9
    record = json.loads((tmp_path / "out" / "ball.json").read_text())
    assert record["model"]["protocol"] == name
    (request,) = record["requests"]
    assert request["status"] == "ok"
    assert len(request["turns"]) == (2 if name == "medsam-agent" else 0)


def test_a_segmenter_that_a_protocol_cannot_use_is_refused_by_name(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "replies.json").write_text('["x"]')
    done = CliRunner().invoke(
        predict,
        [
            *("-i", str(stored / "ball.nii.gz"), "-o", str(tmp_path / "out"), "--prompt", "q", "-device", "cpu"),
            *("--protocol", "seer", "--reasoner", f"scripted:{tmp_path / 'replies.json'}", "--segmenter", "grow"),
        ],
    )
    assert done.exit_code == 1
    assert "text" in done.output


PICTURE_REPLIES = {
    "medvol-r1": ['<think>t</think><answer>[{"slice": 0, "bbox_2d_list": [[100, 150, 400, 450]]}]</answer>'],
    "medreasoner": ["<think>t</think><answer>{'bbox': [100, 150, 400, 450], 'points_1': [250, 300], 'points_2': [220, 330]}</answer>"],
    "medsam-agent": [
        '<tool_call>{"name": "add_bbox", "arguments": {"bbox_2d": [100, 150, 400, 450]}}</tool_call>',
        '<tool_call>{"name": "add_point", "arguments": {"point_2d": [250, 300], "point_type": "positive"}}</tool_call>',
        '<tool_call>{"name": "stop_action", "arguments": {}}</tool_call>',
    ],
}


@pytest.mark.parametrize("name", PICTURE_REPLIES)
def test_coordinates_on_a_picture_are_those_of_the_picture(name: str, tmp_path: Path) -> None:
    """A disc in the upper left of a PNG, boxed where a person sees it, comes back where it is in the PNG."""
    rows, cols = np.ogrid[:100, :100]
    disc = (rows - 30) ** 2 + (cols - 25) ** 2 <= 12**2
    picture = (np.random.default_rng(0).integers(20, 40, (100, 100)) + 180 * disc).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "disc.png")
    predictor = Predictor("grow", ScriptedReasoner(PICTURE_REPLIES[name]), protocol=name, device="cpu")
    made = predictor.predict(tmp_path / "disc.png", "what is bright here?")
    assert made.status == "ok", made.message
    assert made.array is not None
    drawn = made.array[..., 0].T  # stored (x, y, z): x along the columns of the picture
    assert 2 * (drawn & disc).sum() / (drawn.sum() + disc.sum()) > 0.95
    if name == "medsam-agent":
        views = render(volume_of(picture[None].astype(np.int16)), ViewSpec(size_px=64, also=("coronal",)))
        assert len(views.views) == 1
        assert views.others == ()

"""What a reasoner remembers of a dialogue between its turns: it saves work and changes no reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpo_scenes as g
import numpy as np
import pytest
import reasoner_contract as contract
import tiny_vlms
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reasoners_vlm import opened, stock, vision_tower

from seerseg.episode import solve
from seerseg.errors import ModelError
from seerseg.prompts import Prompt
from seerseg.protocols.base import Answer
from seerseg.protocols.messages import ImagePart, Message, TextPart, text_message
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.prefixes import Entry, Prefixes
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.segmenters.scripted import ScriptedSegmenter
from seerseg.training.rollout import Job
from seerseg.views import CaseViews

QWEN = {"qwen3_vl": "3", "qwen2_5_vl": "2.5"}
TURNS = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tiny_vlms.qwen(tmp_path_factory.mktemp(name), generation) for name, generation in QWEN.items()}
    return made | {
        "idefics3": tiny_vlms.idefics3(tmp_path_factory.mktemp("idefics3")),
        "llava": tiny_vlms.llava(tmp_path_factory.mktemp("llava")),
    }


def encoded_images(reasoner: VlmReasoner) -> list[int]:
    """Grows by the number of images at every pass of the vision tower."""
    seen: list[int] = []
    vision_tower(reasoner).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])), with_kwargs=True
    )
    return seen


class Counting:
    """A processor that counts the images it prepares."""

    def __init__(self, processor: Any) -> None:
        self._processor, self.prepared = processor, 0

    def __call__(self, **asked: Any) -> Any:
        self.prepared += sum(map(len, asked.get("images", ())))
        return self._processor(**asked)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


def shown_back(dialogue: int, turn: int, side: int = 48) -> ImagePart:
    return contract.images(1, seed=100 * dialogue + turn, side=side)[0]


def play(reasoner: VlmReasoner, openings: Sequence[list[Message]], *, samples: int = 1, seed: int = 0) -> list[list[list[Message]]]:
    """Dialogues as they stood at every turn; the reply to the first sample is what they go on with."""
    dialogues, stood = [list(opening) for opening in openings], []
    for turn in range(TURNS):
        replies = reasoner.reply(dialogues, samples=samples, seed=seed)
        stood.append([[*d, *(text_message("assistant", text) for text in r)] for d, r in zip(dialogues, replies, strict=True)])
        for number, (dialogue, reply) in enumerate(zip(dialogues, replies, strict=True)):
            further = (
                (shown_back(number, turn), TextPart("Go on."), shown_back(number, turn, 32))
                if turn != 2
                else (TextPart("Nothing changed."),)
            )
            dialogue += [text_message("assistant", reply[0]), Message("user", further)]
    return stood


def texts(stood: list[list[list[Message]]]) -> list[list[str]]:
    return [[message.text for dialogue in turn for message in dialogue] for turn in stood]


def four() -> list[list[Message]]:
    """Two wordings on one case, one on another, one without images."""
    case, other = (*contract.images(2), *contract.images(1, side=64)), contract.images(3, seed=9)
    return [
        contract.dialogue("left lung", shown=case),
        contract.dialogue("the ribs please", shown=case),
        contract.dialogue("left lung", shown=other),
        contract.dialogue("no image at all"),
    ]


# ------------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize(("samples", "seed"), [(1, 0), (2, 3)], ids=["greedy", "sampled"])
def test_turns_are_the_same_with_and_without_a_memory_and_images_go_in_once(
    folders: dict[str, Path], name: str, samples: int, seed: int
) -> None:
    loaded = opened(folders[name]).loaded
    counting = Counting(loaded.processor)
    lasting = VlmReasoner(replace(loaded, processor=counting), Decoding(max_new_tokens=8, max_batch=3))
    anew = opened(folders[name], max_new_tokens=8, max_batch=3, kept_bytes=0)
    once, again = encoded_images(lasting), encoded_images(anew)
    stood = play(lasting, four(), samples=samples, seed=seed)
    assert texts(stood) == texts(play(anew, four(), samples=samples, seed=seed))
    assert len(anew.decoder.prefixes) == 0
    later = 4 * 2 * (TURNS - 2)
    assert sum(once) == 3 + 3 + later, "two openings and what was shown to each of four dialogues"
    assert sum(again) > 3 * sum(once)
    assert counting.prepared == sum(once), "what is not encoded is not prepared, either"


@pytest.mark.parametrize("name", ["idefics3", "llava"])
def test_other_architectures_reply_as_ever(folders: dict[str, Path], name: str) -> None:
    reasoner = opened(folders[name])
    for turn in play(reasoner, four()[:3])[:3]:
        for dialogue in turn:
            assert dialogue[-1].text == stock(reasoner, dialogue[:-1])


@pytest.mark.parametrize("name", QWEN)
def test_likelihoods_after_five_turns_are_those_of_one_pass_over_all(folders: dict[str, Path], name: str) -> None:
    lasting, anew = opened(folders[name], max_new_tokens=8), opened(folders[name], kept_bytes=0)
    once = encoded_images(lasting)
    asked = [dialogue[:-1] for dialogue in play(lasting, four())[-1]]
    sum_once, replies = sum(once), ["left lung", "ribs", "no such thing at all", ""]
    for dialogue in asked:
        found, fresh = lasting.likelihoods(dialogue, replies), anew.likelihoods(dialogue, replies)
        lengths = [len(lasting.encode_reply(text)) for text in replies]
        assert np.allclose(np.divide(found, lengths), np.divide(fresh, lengths), rtol=0, atol=1e-5)
        prompt = lasting.encode(dialogue)
        for text, score in zip(replies, found, strict=True):
            tail = lasting.encode_reply(text)
            ids = torch.tensor([prompt.ids + tail])
            kinds = {n: torch.tensor([kind + [0] * len(tail)]) for n, kind in prompt.kinds.items()} if prompt.images else {}
            with torch.no_grad():
                logits = anew.model(input_ids=ids, **kinds, **prompt.images).logits[0, len(prompt.ids) - 1 : -1]
            anew.model.model.rope_deltas = None
            whole = logits.log_softmax(-1).gather(-1, ids[0, len(prompt.ids) :, None])
            assert score / len(tail) == pytest.approx(float(whole.mean()), abs=1e-5)
    assert sum(once) == sum_once, "what was replied to is not encoded for its likelihood"


def test_images_of_one_size_and_one_name_are_told_apart_by_what_they_show(folders: dict[str, Path]) -> None:
    lasting, anew = opened(folders["qwen3_vl"]), opened(folders["qwen3_vl"], kept_bytes=0)
    first, second, third = ([ImagePart(i.pixels, "same") for i in contract.images(2, seed=seed)] for seed in (1, 2, 3))
    opening = contract.dialogue("left lung", shown=tuple(first))
    turns = [
        [*opening, text_message("assistant", "a"), Message("user", (image, TextPart("Go on."))), *more]
        for image in (first[0], second[0], third[0])
        for more in ([], [text_message("assistant", "a"), Message("user", (third[1], TextPart("Go on.")))])
    ]
    asked = [opening, contract.dialogue("left lung", shown=tuple(second)), contract.dialogue("left lung", shown=tuple(first[::-1])), *turns]
    one_by_one = [lasting.reply([dialogue])[0] for dialogue in asked]
    assert one_by_one == [anew.reply([dialogue])[0] for dialogue in asked]
    assert len({reply for (reply,) in one_by_one}) > 4, "replies must depend on images, or this test shows nothing"


def test_two_threads_may_ask_at_once(folders: dict[str, Path]) -> None:
    """As prediction does: one goes on with a case while the other begins the next."""
    lasting, anew = opened(folders["qwen3_vl"], max_new_tokens=6), opened(folders["qwen3_vl"], max_new_tokens=6, kept_bytes=0)
    with ThreadPoolExecutor(2) as threads:
        played = list(threads.map(lambda opening: texts(play(lasting, [opening])), four()[:3]))
    assert played == [texts(play(anew, [opening])) for opening in four()[:3]]


def test_new_weights_forget(folders: dict[str, Path]) -> None:
    lasting = opened(folders["qwen3_vl"])
    asked = [four()[0]]
    before = lasting.reply(asked)
    calls = encoded_images(lasting)
    assert lasting.reply(asked) == before
    assert not calls
    changes: list[Callable[[Any], None]] = []
    for kind in (
        lambda w: torch.optim.SGD(w, lr=5.0),
        lambda w: torch.optim.AdamW(w, lr=0.3),
        lambda w: torch.optim.AdamW(w, lr=0.3, fused=True),
    ):

        def step(model: Any, kind: Any = kind) -> None:
            weight = model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_(True)
            weight.grad = torch.sin(torch.arange(weight.numel(), dtype=torch.float32)).reshape(weight.shape)
            kind([weight]).step()
            weight.requires_grad_(False)

        changes.append(step)

    def read_in(model: Any) -> None:
        model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items() if "k_proj" in name}, strict=False)

    for change in [*changes, read_in]:
        change(lasting.model)
        calls.clear()
        replies = lasting.reply(asked)
        assert sum(calls) == 3, "all is encoded anew"
        assert replies == VlmReasoner(lasting.loaded, Decoding(max_new_tokens=12, kept_bytes=0)).reply(asked)
    assert replies != before
    lasting.decoder.forget()
    calls.clear()
    lasting.reply(asked)
    assert sum(calls) == 3


def test_the_bound_holds_and_some_dialogues_are_remembered_rather_than_none(folders: dict[str, Path]) -> None:
    openings = [contract.dialogue("left lung", shown=contract.images(2, seed=seed)) for seed in range(6)]
    unbounded = opened(folders["qwen3_vl"])
    counts, wanted = {}, None
    everything = 0
    for bound in (None, 0.6, 0.3, 0.05):
        reasoner = opened(folders["qwen3_vl"], kept_bytes=None if bound is None else int(bound * everything))
        calls = encoded_images(reasoner)
        said = texts(play(reasoner, openings))
        wanted = wanted or said
        assert said == wanted
        counts[bound] = sum(calls)
        if bound is None:
            everything = reasoner.decoder.prefixes.held_bytes
            assert everything > 0
        else:
            assert reasoner.decoder.prefixes.held_bytes <= bound * everything
            assert reasoner.card.identity == unbounded.card.identity, "what is remembered changes no reply"
    assert counts[None] < counts[0.6] < counts[0.3] <= counts[0.05], counts
    with pytest.raises(ModelError, match="kept_bytes"):
        opened(folders["qwen3_vl"], kept_bytes=-1)


# -------------------------------------------------------------------------------------------------------------- rollouts


class Five(g.Turns):
    """Five turns, whatever is said."""

    name = "five"
    max_turns = TURNS

    def read(self, reply: str, views: CaseViews) -> Answer:
        name = sorted(g.MASKS)[len(reply) % 3]
        return Answer(target=name, prompt=Prompt(text=name), done=False)


def test_an_episode_of_five_turns_encodes_every_image_once(folders: dict[str, Path]) -> None:
    reasoner = opened(folders["qwen3_vl"], max_new_tokens=6)
    calls, scenes = encoded_images(reasoner), g.Scenes()
    texts_asked = ["left lung", "outline the left lung"]
    parts: dict[str, Any] = {"protocol": Five(), "segmenter": ScriptedSegmenter(g.MASKS), "targets": scenes.targets}
    episodes = solve(scenes.views("a"), scenes.volume("a"), texts_asked, reasoner=reasoner, **parts)
    assert [len(e.replies) for e in episodes] == [TURNS] * 2
    shown = 2 + 2 * (TURNS - 1)
    assert shown - (TURNS - 1) <= sum(calls) <= shown, "the dialogues share the opening, and what follows while they say the same"
    anew = opened(folders["qwen3_vl"], max_new_tokens=6, kept_bytes=0)
    assert [e.replies for e in solve(scenes.views("a"), scenes.volume("a"), texts_asked, reasoner=anew, **parts)] == [
        e.replies for e in episodes
    ]


@pytest.mark.parametrize("keyed", [True, False], ids=["sampled", "greedy"])
def test_rollouts_of_five_turns_are_the_same_with_and_without_a_memory(folders: dict[str, Path], keyed: bool) -> None:
    rows = [("a", ("left lung",), "left lung"), ("a", ("left lung",), "the lung, left"), ("b", ("ribs",), "ribs")]
    jobs = [Job(*row, f"{n}" if keyed else None) for n, row in enumerate(row for row in rows for _ in range(2))]
    loaded = g.loaded_model(folders["qwen3_vl"])
    made, counts = [], []
    for kept in (None, 0):
        rollouts = g.rollouts_of(loaded, Five(), tokens=6)
        rollouts.reasoner = VlmReasoner(rollouts.reasoner.loaded, replace(rollouts.reasoner.decoding, kept_bytes=kept))
        calls = encoded_images(rollouts.reasoner)
        with torch.no_grad():
            made.append(rollouts.run(jobs))
        counts.append(sum(calls))
        assert len(rollouts.reasoner.decoder.prefixes) == 0, "the memory is given back for the step"
    assert [r.line.ids for r in made[0]] == [r.line.ids for r in made[1]]
    assert [r.values for r in made[0]] == [r.values for r in made[1]]
    histories = {(r.job.case, tuple(image.pixels.tobytes() for image in r.images), tuple(r.line.ids)) for r in made[0]}
    assert counts[0] <= 2 * 2 + len(histories) * (TURNS - 1), "each opening once, each further image once"
    assert counts[1] > 2 * counts[0]


# ---------------------------------------------------------------------------------------------------------------- memory


def entry_of(prefixes: Prefixes, ids: list[int], marks: tuple[str, ...], ends: int) -> Entry:
    """As the decoder makes one; the key of a token is the sum of all tokens up to it, its value the negative."""
    found = prefixes.find(ids, marks, splits=True)
    start = found.length if found else 0
    sums = torch.tensor(np.cumsum(ids), dtype=torch.float32)[start:].reshape(1, 1, -1, 1)
    return Entry(ids, marks, ends, 0, start, [(sums, -sums)] * 2, found.entry if found else None)


class Model(torch.nn.Linear):
    """Something with weights on a device."""

    device = torch.device("cpu")


@given(st.lists(st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=9), st.booleans()), max_size=25), st.integers(0, 400))
@settings(deadline=None, max_examples=60)
def test_what_is_found_was_put_in_and_the_bound_holds(asked: list[tuple[list[int], bool]], limit: int) -> None:
    prefixes, model = Prefixes(limit), Model(1, 1)
    for ids, begins in asked:
        if begins:
            prefixes.begin(model)
        ends = min(3, len(ids))
        marks = tuple(map(str, ids[:ends]))
        made = entry_of(prefixes, ids, marks, ends)
        assert made.start == 0 or made.start >= ends - 2
        if made.start < len(ids):
            prefixes.keep(made)
        for layer in (0, 1):
            keys, values = torch.zeros((2, 1, len(ids), 1)), torch.zeros((2, 1, len(ids), 1))
            made.write(layer, keys, values, len(ids))
            assert keys[0, 0, :, 0].tolist() == keys[1, 0, :, 0].tolist() == (-values[0, 0, :, 0]).tolist() == np.cumsum(ids).tolist()
        assert prefixes.held_bytes <= limit

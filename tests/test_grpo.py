"""Training by reward: steps against a plain-torch reference, rollouts, guards, survival, and a task that is really learnt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpo_scenes as g
import numpy as np
import pytest
import reference_step as reference
import torch
import training_cases
from click.testing import CliRunner
from test_training_runs import SETTINGS

from seerseg.errors import ModelError, NothingToDoError, PlanError, SegmenterError, UsageError
from seerseg.reasoners.decoding import Line
from seerseg.rewards import RewardConfig
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.segmenters.scripted import ScriptedSegmenter
from seerseg.skills.base import Query, Skill
from seerseg.training import grpo, guards
from seerseg.training.callbacks import Metrics, Outside, Survival
from seerseg.training.rollout import Job, ParaphraseSet, Rollout, Rollouts, paraphrase_sets
from seerseg.training.runs import RunFolder
from seerseg.training.stability import group_rewards

# TRL asks transformers for what it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return g.model_folder(tmp_path_factory.mktemp("model"))


class Recorded(Rollouts):
    """Keeps what it made."""

    made: list[list[Rollout]]

    def run(self, jobs: Sequence[Job]) -> list[Rollout]:
        done = super().run(jobs)
        self.made = [*getattr(self, "made", []), done]
        return done


def recorded(rollouts: Rollouts) -> Recorded:
    rollouts.__class__ = Recorded
    assert isinstance(rollouts, Recorded)
    return rollouts


def jobs(*numbers: int, key: str | None = "k") -> list[Job]:
    rows = [(s, text) for s in g.SETS for text in s.texts]
    return [Job(rows[n][0].case, rows[n][0].target, rows[n][1], None if key is None else f"{key}{i}") for i, n in enumerate(numbers)]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


# ----------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(("protocol", "lora"), [(g.Letters, False), (g.Turns, True)], ids=["one turn, whole model", "three turns, adapter"])
def test_steps_are_those_of_the_reference(folder: Path, tmp_path: Path, protocol: Any, lora: bool) -> None:
    loaded = g.loaded_model(folder, lora=lora)
    rollouts = recorded(g.rollouts_of(loaded, protocol(), tokens=6))
    start = copy.deepcopy(loaded.model)
    trainer = g.trainer_of(loaded, tmp_path, rollouts, beta=0.05, resamples=0, steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    ours, before = copy.deepcopy(start), copy.deepcopy(start)
    for number, made in enumerate(rollouts.made):
        values = {name: np.array([r.values[name] for r in made]).reshape(-1, 2, 2) for name in rollouts.reward.terms}
        rewards = torch.tensor(group_rewards(rollouts.reward, values).reshape(-1), dtype=torch.float32)
        assert rewards.unique().numel() > 1
        loss = reference.step(ours, before, made, rewards, rate=1e-2, group=4, longest=6 * rollouts.protocol.max_turns, beta=0.05)
        assert logs[number]["reward"] == pytest.approx(float(rewards.mean()), abs=1e-5)
        assert loss == pytest.approx(logs[number]["loss"], abs=2e-4)  # logged with four digits
    learnt = {name: w for name, w in weights(loaded.model).items() if ".ref." not in name}
    moved = 0.0
    for name, weight in weights(ours).items():
        torch.testing.assert_close(learnt[name], weight, rtol=1e-4, atol=1e-5)
        moved += float((weight - weights(start)[name]).abs().sum())
    assert moved > 0
    if protocol is g.Turns:
        assert any(0 in r.own for r in rollouts.made[0]), "some dialogue went on"
        assert logs[0]["turns"] > 1
    for name in ("rewards/dice/mean", "rewards/format/mean", "dice_worst", "dice_std", "kl", "zero_spread", "prompt_length", "step_time"):
        assert name in logs[0], name
    assert {"generate", "segment", "score", "encode", "step"} <= rollouts.parts.take().keys()


def test_a_step_that_credits_turns_is_that_of_the_reference(folder: Path, tmp_path: Path) -> None:
    reward = RewardConfig.from_json({"terms": {"dice": 2.0, "format": 0.5}, "turns": "dice"})
    loaded = g.loaded_model(folder)
    rollouts = recorded(g.rollouts_of(loaded, g.Turns(), reward, tokens=6))
    ours = copy.deepcopy(loaded.model)
    trainer = g.trainer_of(loaded, tmp_path, rollouts, beta=0.0, resamples=0, steps=1)
    trainer.train()
    (made,) = rollouts.made
    total = [2.0 * r.values["dice"] + 0.5 * r.values["format"] for r in made]
    to_go = [[total[i] - (2.0 * r.overlaps[t - 1].dice if t else 0.0) for t in range(len(r.dialogue.replies))] for i, r in enumerate(made)]
    credit, differ = [], False
    for place, rollout in enumerate(made):
        group = [to_go[i] for i in range(place // 4 * 4, place // 4 * 4 + 4)]
        tokens, turn = [], -1
        for before, now in zip([0, *rollout.own], rollout.own, strict=False):
            turn += int(now == 1 and before == 0)
            others = [row[turn] for row in group if turn < len(row)]
            tokens.append(to_go[place][turn] - sum(others) / len(others))
        differ |= max(tokens) - min(tokens) > 1e-3
        credit.append(torch.tensor(tokens))
    assert differ, "turns of a dialogue are credited differently"
    reference.step(ours, ours, made, torch.tensor(total), rate=1e-2, group=4, longest=18, beta=0.0, credit=credit)
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weights(loaded.model)[name], weight, rtol=1e-4, atol=1e-5)
    logged = trainer.state.log_history[0]
    assert logged["turns"] > 1
    assert 0 <= logged["idle_turns"] <= 1


@pytest.mark.parametrize("lora", [False, True], ids=["whole model", "adapter"])
def test_steps_of_an_idefics3_are_those_of_the_reference(tmp_path: Path, lora: bool) -> None:
    import tiny_vlms

    folder = tiny_vlms.idefics3(tmp_path / "model")
    loaded = g.loaded_model(folder, lora=lora)
    rollouts = recorded(g.rollouts_of(loaded, tokens=6))
    start = copy.deepcopy(loaded.model)
    g.trainer_of(loaded, tmp_path, rollouts, beta=0.05, resamples=0, steps=2, micro=2, accumulation=4).train()
    ours, before = copy.deepcopy(start), copy.deepcopy(start)
    for made in rollouts.made:
        assert len({sum(map(len, r.job.text.split())) for r in made}) > 1
        values = {name: np.array([r.values[name] for r in made]).reshape(-1, 2, 2) for name in rollouts.reward.terms}
        rewards = torch.tensor(group_rewards(rollouts.reward, values).reshape(-1), dtype=torch.float32)
        reference.step(ours, before, made, rewards, rate=1e-2, group=4, longest=6, beta=0.05)
    learnt, moved = weights(loaded.model), 0.0
    for name, weight in weights(ours).items():
        torch.testing.assert_close(learnt[name], weight, rtol=1e-4, atol=1e-5)
        moved += float((weight - weights(start)[name]).abs().sum())
    assert moved > 0
    with pytest.raises(ModelError, match="cannot be shown further images"):
        guards.check_model(g.rollouts_of(loaded, g.Turns()))


def test_log_probabilities_in_training_are_those_of_an_unpadded_pass(folder: Path, tmp_path: Path) -> None:
    loaded = g.loaded_model(folder)
    rollouts = g.rollouts_of(loaded, g.Turns())
    trainer = g.trainer_of(loaded, tmp_path, rollouts)
    kept: list[list[Rollout]] = []
    hand_over = trainer.hand_over
    trainer.hand_over = lambda: (kept.append(list(trainer._now)), hand_over())[1]
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"set": 0}] * 4 + [{"set": 2}] * 4)
    trainer.model.eval()
    whole = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    keys = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    assert len({sum(row) for row in mask.tolist()}) > 1, "rows are padded"
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, whole, mask, batch["completion_ids"].shape[1], **{key: batch[key] for key in keys}
        )
        for row, rollout in enumerate(kept[0]):
            alone = reference.log_probabilities(trainer.model, rollout)
            assert torch.allclose(found[row, : len(alone)], alone, atol=1e-5)
            assert batch["tool_mask"][row, : len(alone)].tolist() == rollout.own
    assert trainer.processing_class.image_processor.__class__ is not grpo._Ready
    assert not trainer.tools


def test_flat_groups_are_drawn_anew_from_other_sets(folder: Path, tmp_path: Path) -> None:
    loaded = g.loaded_model(folder)
    nothing = CachedSegmenter(ScriptedSegmenter({name: np.zeros(g.GRID.shape_zyx, bool) for name in g.MASKS}))
    rollouts = recorded(g.rollouts_of(loaded, None, RewardConfig.from_json({"terms": {"iou": 1.0}}), segmenter=nothing))
    trainer = g.trainer_of(loaded, tmp_path, rollouts, sets=g.SETS[:3], steps=1, resamples=2)
    trainer.train()
    first = trainer.state.log_history[0]
    assert (first["zero_spread"], first["zero_spread_left"]) == (1.0, 1.0)
    assert len(rollouts.made) == 3, "drawn, and twice anew"
    keys = [{r.job.key for r in made} for made in rollouts.made]
    assert not keys[0] & keys[1]
    assert first["grad_norm"] == pytest.approx(0.0, abs=1e-8)


def test_groups_hold_wordings_of_one_set_and_a_bank_is_asked_at_every_step(folder: Path, tmp_path: Path) -> None:
    class Turning:
        identity, mode, asked = "turning", "online", 0

        def retrieve(self, query: Query, limit: int) -> Sequence[Skill]:
            self.asked += 1
            return [replace(SKILL, what=f"version {self.asked}")]

    SKILL = Skill(id="", tag="PROMPT_NORMALIZE", when="always", what="version 0")
    loaded, bank = g.loaded_model(folder), Turning()
    rollouts = recorded(g.rollouts_of(loaded, bank=bank))
    g.trainer_of(loaded, tmp_path, rollouts, resamples=0).train()
    assert bank.asked == 16
    shown = [[r.dialogue.skills[0].what for r in made] for made in rollouts.made]
    assert shown[1][0] == "version 9", "the second step sees the bank as it is then"
    for made in rollouts.made:
        for start in (0, 4):
            group = made[start : start + 4]
            assert len({(r.job.case, r.job.target) for r in group}) == 1
            assert group[0].job.text == group[1].job.text != group[2].job.text == group[3].job.text
    assert len({r.job.key for made in rollouts.made for r in made}) == 16


# -------------------------------------------------------------------------------------------------------------- rollouts


def test_rollouts_do_not_depend_on_what_is_made_beside_them(folder: Path) -> None:
    for protocol in (g.Letters(), g.Turns()):
        rollouts = g.rollouts_of(g.loaded_model(folder), protocol)
        asked = jobs(0, 3, 5, 8, 9, 1)
        with torch.no_grad():
            whole = rollouts.run(asked)
            parts = [*rollouts.run(asked[:2]), *rollouts.run(asked[2:])]
            again = rollouts.run([replace(job, key=f"other {job.key}") for job in asked])
        assert [r.reply for r in whole] == [r.reply for r in parts]
        assert [r.values for r in whole] == [r.values for r in parts]
        assert [r.reply for r in whole] != [r.reply for r in again]


def test_identical_answers_are_segmented_once_and_faults_are_told(folder: Path) -> None:
    segmenter = ScriptedSegmenter(g.MASKS)
    rollouts = g.rollouts_of(g.loaded_model(folder), segmenter=CachedSegmenter(segmenter))
    with torch.no_grad():
        made = rollouts.run([replace(jobs(0)[0], key=str(n)) for n in range(12)])
    drawn = [r.dialogue.answer.prompt.text for r in made if r.dialogue.answer is not None and r.dialogue.answer.prompt is not None]
    assert len(drawn) > 3
    assert sum(len(call.prompts) for call in segmenter.calls) == len(set(drawn))

    def fails(volume: Any, prompt: Any) -> Any:
        raise SegmenterError("It broke.")

    rollouts = g.rollouts_of(g.loaded_model(folder), segmenter=ScriptedSegmenter(dict.fromkeys(g.MASKS, fails)))
    with torch.no_grad(), pytest.raises(SegmenterError, match="It broke"):
        rollouts.run([replace(jobs(0)[0], key=str(n)) for n in range(12)])


def test_a_segmenter_that_fails_between_turns_ends_no_rollout(folder: Path) -> None:
    opened: list[Any] = []

    class Breaks(ScriptedSegmenter):
        """Its sessions fail at every second turn."""

        def session(self, volume: Any) -> Any:
            inner, turns = super().session(volume), [0]

            def add(prompt: Any) -> Any:
                turns[0] += 1
                if turns[0] % 2 == 0:
                    raise SegmenterError("It broke.")
                return inner.add(prompt)

            opened.append(made := SimpleNamespace(add=add, undo=inner.undo, close=lambda: opened.remove(made)))
            return made

    rollouts = g.rollouts_of(g.loaded_model(folder), g.Turns(), segmenter=Breaks(g.MASKS))
    with torch.no_grad():
        made = rollouts.run([replace(jobs(0)[0], key=str(n)) for n in range(12)])
    broken = [r for r in made if len(r.dialogue.turns) > 1]
    assert broken
    for rollout in broken:
        assert rollout.dialogue.turns[1].message == "It broke."
        assert rollout.overlaps[1] == rollout.overlaps[0], "the mask before it stands"
        assert rollout.values.keys() >= {"dice", "format"}
    assert not opened, "every session was closed"


def test_dialogues_of_different_images_are_decoded_together_as_each_alone(folder: Path) -> None:
    rollouts = g.rollouts_of(g.loaded_model(folder), tokens=10)
    reasoner = rollouts.reasoner
    encoded = [r.prompt for r in rollouts._begin(jobs(0, 1, 2, 5, 6, 8))]
    assert len({len(e.ids) for e in encoded}) > 2
    with torch.no_grad():
        for keys in ([None] * 6, [f"k{n}" for n in range(6)], ["a", None, "b", None, "c", None]):
            lines = [Line(e, key) for e, key in zip(encoded, keys, strict=True)]
            together = reasoner.decoder.replies(lines)
            assert together == [reasoner.decoder.replies([line])[0] for line in lines]


def test_a_dialogue_goes_on_with_the_tokens_it_had(folder: Path) -> None:
    rollouts = g.rollouts_of(g.loaded_model(folder), g.Turns())
    with torch.no_grad():
        made = rollouts.run(jobs(0, 1, 2, 3, 4, 5))
    several = [r for r in made if len(r.dialogue.replies) > 1]
    assert several
    for rollout in several:
        assert rollout.prompt.ids + rollout.reply[: len(rollout.line.ids) - len(rollout.prompt.ids)] == rollout.line.ids
        text = rollouts.reasoner.tokenizer.decode(rollout.line.ids)
        assert text.count("<|im_start|>assistant") == len(rollout.dialogue.replies)
        assert text.count("Go on.") == len(rollout.dialogue.replies) - 1
        grid = rollout.line.images["image_grid_thw"]
        assert len(grid) == len(rollout.images) == 2 + len(rollout.dialogue.replies) - 1
        assert len(rollout.own) == len(rollout.reply)


def test_wordings_and_sets() -> None:
    sets = paraphrase_sets([("a", ("x",), "1"), ("b", None, "2"), ("a", ("x",), "3"), ("a", ("x",), "1")])
    assert sets == (ParaphraseSet("a", ("x",), ("1", "3")), ParaphraseSet("b", None, ("2",)))
    assert sorted(sets[0].wordings(4, [1, 2])) == ["1", "1", "3", "3"]
    many = ParaphraseSet("a", None, tuple("abcdefgh"))
    assert many.wordings(3, [1]) == many.wordings(3, [1]) != many.wordings(3, [2])
    assert len(set(many.wordings(8, [3]))) == 8


# ---------------------------------------------------------------------------------------------------------------- guards


def test_what_is_seldom_asked_for_is_seldom_drawn() -> None:
    sets = [
        ParaphraseSet("a", ("ribs",), tuple("abcdefgh")),
        ParaphraseSet("a", ("heart",), tuple("abcdefghij")),
        ParaphraseSet("a", None, ("a", "b")),
    ]
    assert grpo.shares(sets) == [1.0, 1.0, 0.25]
    assert grpo.shares(sets[:1]) == [1.0]


def test_the_tested_range_of_trl() -> None:
    guards.check_trl()
    guards.check_trl("1.16.9")
    for version in ("1.15.3", "1.17.0", "0.24.0", "2.0"):
        with pytest.raises(ModelError, match=f"TRL {version} is installed"):
            guards.check_trl(version)


GOOD = {
    "use_vllm": False, "vllm_mode": "server", "use_transformers_continuous_batching": False, "num_generations": 4,
    "steps_per_generation": 2, "gradient_accumulation_steps": 2, "num_iterations": 1,
    "scale_rewards": "none", "loss_type": "dr_grpo", "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_vllm": True}, "server mode gives the first wording's replies"),
        ({"use_vllm": True, "vllm_mode": "colocate"}, "our own decode loop"),
        ({"use_transformers_continuous_batching": True}, "our own decode loop"),
        ({"num_generations": 8}, "2 wordings times 2 replies"),
        ({"steps_per_generation": 4}, "once per update"),
        ({"num_iterations": 2}, "once per update"),
        ({"scale_rewards": "group"}, "part of the stability penalty back"),
        ({"loss_type": "dapo"}, "another objective"),
        ({"top_p": 0.9}, "as the model gives them"),
        ({"repetition_penalty": 1.1}, "as the model gives them"),
    ],
)
def test_settings_that_would_be_silently_wrong(change: dict[str, Any], says: str) -> None:
    settings = guards.GrpoSettings(2, 2)
    guards.check_arguments(SimpleNamespace(**GOOD), settings)
    with pytest.raises((PlanError, UsageError), match=says):
        guards.check_arguments(SimpleNamespace(**{**GOOD, **change}), settings)


def test_batches_that_hold_no_whole_groups_and_lonely_replies(folder: Path, tmp_path: Path) -> None:
    loaded = g.loaded_model(folder)
    with pytest.raises(PlanError, match="whole groups of 4"):
        g.trainer_of(loaded, tmp_path, micro=3, accumulation=2)
    with pytest.raises(PlanError, match="at least 2 replies"):
        g.trainer_of(loaded, tmp_path, paraphrases=1, samples=1)


def test_models_and_decoding_that_cannot_be_learnt_from(folder: Path) -> None:
    rollouts = g.rollouts_of(g.loaded_model(folder))
    guards.check_model(rollouts)
    broken = g.rollouts_of(g.loaded_model(folder))
    broken.reasoner.decoder.suppressed = ()
    with pytest.raises(ModelError, match="may write the image tokens"):
        guards.check_model(broken)
    narrow = g.rollouts_of(g.loaded_model(folder))
    narrow.reasoner.decoding = replace(narrow.reasoner.decoding, top_p=0.9)
    with pytest.raises(ModelError, match="another gradient"):
        guards.check_model(narrow)


def test_a_segmenter_that_cannot_take_the_answers() -> None:
    ground: Any = SimpleNamespace(protocol=g.Letters())
    guards.check_segmenter(ScriptedSegmenter(g.MASKS), ground)
    with pytest.raises(UsageError, match="Choose another segmenter or protocol"):
        guards.check_segmenter(ScriptedSegmenter({}), ground)


def test_replies_of_training_hold_no_image_token(folder: Path) -> None:
    loaded = g.loaded_model(folder)
    rollouts = g.rollouts_of(loaded, tokens=40)
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[loaded.model.config.image_token_id] = 50.0
        made = rollouts.run(jobs(0, 1, 2, 3))
    assert not any(loaded.model.config.image_token_id in r.reply for r in made)


# -------------------------------------------------------------------------------------------------------------- survival


def test_a_run_that_is_stopped_and_continued_is_the_undisturbed_one(folder: Path, tmp_path: Path) -> None:
    def run(where: Path, stop_after: int | None, resume: str | None) -> tuple[dict[str, torch.Tensor], RunFolder, Any]:
        place = RunFolder(where, "grpo")
        loaded = g.loaded_model(folder)
        settings = replace(SETTINGS, stage="grpo", batch=8, steps=4, checkpoint_minutes=1e9)
        if resume is None:
            place.begin(settings, {}, resume=False)
        trainer = None
        outside = Outside(stop=lambda: stop_after is not None and trainer is not None and trainer.state.global_step >= stop_after)
        survival = Survival(place, settings, outside=outside, score=grpo.score)
        rollouts = g.rollouts_of(loaded)
        trainer = g.trainer_of(
            loaded, place.saving, rollouts, steps=4, beta=0.05, optim="adamw_torch", val=g.SETS[:2], evaluate_steps=2, learning_rate=1e-3,
            callbacks=[survival, Metrics(place, settings, rollouts.parts)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return weights(loaded.model), place, trainer

    undisturbed, _, _ = run(tmp_path / "a", None, None)
    _, place, trainer = run(tmp_path / "b", 2, None)
    assert (trainer.state.global_step, place.latest.step) == (2, 2)
    assert place.latest.score is not None, "chosen by validation"
    continued, place, trainer = run(tmp_path / "b", None, str(place.latest.path))
    assert trainer.state.global_step == 4
    for name, weight in undisturbed.items():
        torch.testing.assert_close(continued[name], weight, rtol=1e-5, atol=1e-6)
    lines = training_cases.metrics(place.folder)
    assert any("val_dice_worst" in line for line in lines)
    assert any("seconds_generate" in line for line in lines)


@pytest.mark.slow
def test_the_command_trains_by_reward(folder: Path, tmp_path: Path) -> None:
    from seerseg.cli.train import train

    toy = training_cases.make(tmp_path, cases=8)
    arguments = training_cases.command(toy, folder, "--stage", "grpo", "--steps", "2", "--paraphrases", "2", "--samples", "2")
    small = ["--set", "grpo.sets_per_update=2", "--max_new_tokens", "6"]
    done = CliRunner().invoke(train, [*arguments, *small], env=toy.env, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = training_cases.run_folder(toy, folder)
    lines = training_cases.metrics(found / "grpo")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all("zero_spread" in line for line in lines if "loss" in line)


def test_a_fold_without_words_to_learn(tmp_path: Path) -> None:
    ground: Any = SimpleNamespace(
        folder=tmp_path, dataset=SimpleNamespace(name="Dataset001_X", requests=()), fold=SimpleNamespace(train=(), val=()), number=0
    )
    with pytest.raises(NothingToDoError, match="no request in training language"):
        grpo.training_sets(ground)


@pytest.mark.slow
def test_a_toy_task_is_learnt(folder: Path, tmp_path: Path) -> None:
    loaded = g.loaded_model(folder)
    rollouts = g.rollouts_of(loaded, None, RewardConfig.from_json({"terms": {"dice": 1.0}, "stability": {"lambda": 0.5}}), tokens=2)
    trainer = g.trainer_of(
        loaded, tmp_path, rollouts, sets=g.SETS[:3], steps=40, paraphrases=2, samples=4, micro=8, accumulation=2, beta=0.01,
        optim="adamw_torch", learning_rate=3e-3, max_grad_norm=1.0,
    )  # fmt: skip
    trainer.train()
    scores = [entry["dice_mean"] for entry in trainer.state.log_history if "dice_mean" in entry]
    assert np.mean(scores[:5]) < 0.6
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.15

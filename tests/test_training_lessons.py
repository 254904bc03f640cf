"""Skills in training: samples that use what fits and leave the rest, a bank that is never a step behind, and one that has seen too much."""

# ruff: noqa: F401, F811 - the encoder's folder is another file's fixture

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpo_scenes as g
import numpy as np
import pytest
import torch
import training_cases as tc
from click.testing import CliRunner
from test_grpo import recorded, weights
from test_skill_encoder import folder
from test_training_runs import SETTINGS
from transformers import TrainerCallback

from seerseg.cli.train import train
from seerseg.errors import BankError
from seerseg.protocols import load_protocol
from seerseg.skills.base import Audit, Query, Skill, named_skills
from seerseg.skills.fence import Fence, LiveBank
from seerseg.skills.store import BankFolder
from seerseg.training import grpo
from seerseg.training.callbacks import Metrics, Outside, Survival
from seerseg.training.data import Ground, dialogue_of, open_ground, read_samples
from seerseg.training.lessons import Lessons, leads_to, open_frozen, training_fence
from seerseg.training.runs import RunFolder
from seerseg.training.settings import plans_for

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def skill(words: str, target: str | None, tag: str = "MESSY_INPUT_REPAIR", **more: Any) -> Skill:
    return Skill("", tag, f"the request says {words}", f"answer {target or 'absent'}", words=(words,), target=target, **more)


LIVR, SPLEN, NOWHERE = skill("the livr", "liver"), skill("splen", "spleen"), skill("the prostate", None)
ASTRAY = skill("outline the liver", "spleen", "VERBOSE_PRUNE")
SKILLS = (LIVR, SPLEN, NOWHERE, ASTRAY, skill("quax zorb", "spleen", "VERBOSE_PRUNE"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tc.Toy:
    return tc.make(tmp_path_factory.mktemp("toy"))


def ground_of(toy: tc.Toy, **edits: Any) -> Ground:
    plans = plans_for(toy.preprocessed, "plans", {"views.count": 2, "views.size_px": 64, **edits})
    return open_ground(toy.root / "raw" / tc.NAME, toy.preprocessed, 0, plans, load_protocol("seer"))


def bank_of(folder: Path, *skills: Skill) -> Path:
    BankFolder(folder).change(lambda now: {**now, **{s.id: s for s in skills}}, "made")
    return folder


def lessons_of(ground: Ground, folder: Path) -> Lessons:
    frozen, live = open_frozen(folder, ground)
    return Lessons.planned(frozen, live, ground.plans, ground.targets.names)


def prompt_of(sample: Any, ground: Ground) -> str:
    from seerseg.training.data import Cases

    messages = dialogue_of(sample, ground, Cases(ground).views(sample.row.case))
    return "\n".join(message.text for message in messages)


# --- what a sample is shown


def test_a_right_skill_is_named_and_all_else_is_left(toy: tc.Toy, tmp_path: Path) -> None:
    ground = ground_of(toy, **{"sft.skills_share": 1, "sft.skills_right": 0.6, "sft.skills_wrong": 0.3})
    plain, taught = read_samples(ground), read_samples(ground, lessons_of(ground, bank_of(tmp_path, *SKILLS)))
    assert sum(taught.dealt.values()) == len(plain.train) == len(taught.train)
    assert {"right", "distractors"} <= set(taught.dealt)
    for before, after in zip(plain.train, taught.train, strict=True):
        answer = before.row.trace.answer
        said = named_skills(after.row.trace.rationale, after.skills)
        right = [s for s in after.skills if leads_to(s) == answer]
        assert [s.id for s in right] == list(said), "the one that leads to the answer is named, no other is"
        if right:
            assert after.row.trace.rationale == f"{said[0]}: {before.row.trace.rationale}"
            assert said[0] in after.replies[0]
        else:
            assert after.replies == before.replies, "skills that lead elsewhere change nothing"
        assert before.row.trace.answer == after.row.trace.answer
        prompt = prompt_of(after, ground)
        assert all(s.id in prompt for s in after.skills)
        assert ("<skill_bank>" in prompt) == bool(after.skills)
        assert len(after.skills) <= 3


def test_small_reasoners_name_a_skill_by_its_number(toy: tc.Toy, tmp_path: Path) -> None:
    ground = ground_of(toy, **{"sft.skills_share": 1, "sft.skills_right": 1})
    lessons = dataclasses.replace(lessons_of(ground, bank_of(tmp_path, *SKILLS)), numbered=True)
    right = [s for s in read_samples(ground, lessons).train if "[" in s.row.trace.rationale]
    assert right
    for sample in right:
        (named,) = named_skills(sample.row.trace.rationale, sample.skills)
        assert leads_to(next(s for s in sample.skills if s.id == named)) == sample.row.trace.answer


def test_a_wrong_skill_fits_the_words_and_leads_elsewhere(toy: tc.Toy, tmp_path: Path) -> None:
    ground = ground_of(toy, **{"sft.skills_share": 1, "sft.skills_right": 0, "sft.skills_wrong": 1})
    lessons = lessons_of(ground, bank_of(tmp_path, LIVR, SPLEN))
    assert ground.rows is not None
    wrong = [d for d in (lessons.deal(row, "CT") for row in ground.rows) if d.kind == "wrong"]
    assert wrong
    for dealt in wrong:
        assert all(leads_to(s) != dealt.row.trace.answer for s in dealt.skills)
        assert any(set(s.words) & {"the livr", "splen"} for s in dealt.skills)
        assert dealt.row in ground.rows, "nothing of it enters the reply"


def test_shares_are_the_plans_and_depend_on_the_trace_alone(toy: tc.Toy, tmp_path: Path) -> None:
    ground = ground_of(toy)
    lessons = lessons_of(ground, bank_of(tmp_path, *SKILLS))
    assert (lessons.share, lessons.right, lessons.wrong) == (0.5, 0.6, 0.1)
    assert ground.rows is not None
    row = next(r for r in ground.rows if r.text == "the livr")
    kinds = Counter(lessons.deal(dataclasses.replace(row, id=f"r{n}"), "CT").kind for n in range(1000))
    assert {kind: round(count / 1000, 1) for kind, count in kinds.items()} == {
        "none": 0.5,
        "right": 0.3,
        "wrong": 0.1,
        "distractors": 0.1,
    } | ({"wrong": 0.0} if kinds["wrong"] < 50 else {})
    one, two = ([lessons.deal(r, "CT").skills for r in order] for order in (ground.rows, ground.rows[::-1]))
    assert one == two[::-1]


def test_without_a_bank_all_is_as_it_was(toy: tc.Toy) -> None:
    ground = ground_of(toy)
    samples = read_samples(ground)
    assert (samples.dealt, samples.bank) == ({}, None)
    assert not any(s.skills for s in (*samples.train, *samples.val))


def test_plans_from_before_there_were_skills_are_good_as_they_are(toy: tc.Toy) -> None:
    path = toy.preprocessed / "old.json"
    said = json.loads((toy.preprocessed / "plans.json").read_text())
    for name in ("share", "right", "wrong"):
        del said["mathematics"][f"sft.skills_{name}"]
    path.write_text(json.dumps({**said, "name": "old"}))
    old = plans_for(toy.preprocessed, "old")
    assert old.value("sft.skills_share") == 0.5
    assert "sft.skills_share" not in old.values
    assert old.edited({"sft.skills_share": 0.25}).value("sft.skills_share") == 0.25


# --- what a bank must not have seen


@pytest.mark.parametrize("part", ["val", "bank", "test"])
def test_a_bank_that_saw_a_held_out_case_is_refused(toy: tc.Toy, tmp_path: Path, part: str) -> None:
    ground = ground_of(toy)
    held = {case for case in ground.dataset.cases if case not in ground.fold.train}
    case = {"val": ground.fold.val[0], "bank": ground.fold.bank[0]}.get(part) or min(held - {*ground.fold.val, *ground.fold.bank})
    leak = dataclasses.replace(LIVR, audit=Audit("loop", (f"{case}/r1",)))
    with pytest.raises(BankError, match=f"case '{case}' is held out"):
        open_frozen(bank_of(tmp_path, SPLEN, leak), ground)
    with pytest.raises(BankError, match="is held out"):
        LiveBank(tmp_path, fence=training_fence(ground))


def test_a_bank_that_was_evolved_on_test_cases_is_refused(toy: tc.Toy, tmp_path: Path) -> None:
    BankFolder(tmp_path).declare("transductive")
    with pytest.raises(BankError, match="nothing may learn from it"):
        open_frozen(bank_of(tmp_path, LIVR), ground_of(toy))
    with pytest.raises(BankError, match="is no skill bank in"):
        open_frozen(tmp_path / "none", ground_of(toy))


def test_a_held_out_request_inside_a_skill_is_found_by_its_words() -> None:
    fence = Fence(frozenset(), frozenset({"show me the lvier"}))
    fence.check(skill("me the lvier", "liver"))
    for text in ("Show me the LVIER!", "he said: show me, the lvier. please"):
        with pytest.raises(BankError, match="repeats a held-out request"):
            fence.check(skill(text, "liver"))


# --- a live bank


def test_a_live_bank_is_what_it_was_until_it_is_looked_up(tmp_path: Path) -> None:
    said: list[str] = []
    live = LiveBank(bank_of(tmp_path, SPLEN), say=said.append)
    first = (live.number, live.version, live.root)
    bank_of(tmp_path, LIVR)
    assert live.retrieve(Query("the livr"), 3) == []
    assert (live.number, live.version, live.root) == first
    assert live.refresh() == first[0] + 1 == live.number
    assert live.retrieve(Query("the livr"), 3) == [LIVR]
    assert live.root == first[2]
    assert "state 2 (2 skills in use" in said[-1]
    live.check_descends({"number": first[0], "version": first[1]})
    with pytest.raises(BankError, match=r"that state of .* is another"):
        live.check_descends({"number": 1, "version": live.version})


class Teacher(TrainerCallback):
    """Puts a skill into a bank when a step has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = f"s-step{state.global_step}"
        made = dataclasses.replace(skill("lung", f"lung {state.global_step}", f"STEP_{state.global_step}"), id=name)
        bank_of(self.folder, made)


def run_with(folder: Path, where: Path, bank: Path, *, stop_after: int | None = None, resume: bool = False, teach: bool = True) -> Any:
    place = RunFolder(where, "grpo")
    settings = dataclasses.replace(SETTINGS, stage="grpo", batch=8, steps=3, checkpoint_minutes=1e9)
    latest = place.latest if resume else place.begin(settings, {}, resume=False)
    loaded, live = g.loaded_model(folder), LiveBank(bank)
    rollouts = recorded(g.rollouts_of(loaded, bank=live))
    trainer: Any = None
    outside = Outside(stop=lambda: stop_after is not None and trainer is not None and trainer.state.global_step >= stop_after)
    survival = Survival(place, settings, outside=outside, score=grpo.score, bank=live.to_json)
    trainer = g.trainer_of(
        loaded, place.saving, rollouts, sets=g.SETS[:2], steps=3, resamples=0, learning_rate=1e-3,
        callbacks=[survival, Metrics(place, settings, rollouts.parts), *([Teacher(bank)] if teach else [])],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if latest is None else str(latest.path))
    return place, rollouts, weights(loaded.model)


def test_grpo_sees_the_bank_as_it_is_at_every_step(tmp_path: Path) -> None:
    folder = g.model_folder(tmp_path / "model")
    bank = bank_of(tmp_path / "bank", dataclasses.replace(skill("lung", "lung 0"), id="s-step0"))
    place, rollouts, _ = run_with(folder, tmp_path / "run", bank)
    shown = [{s.id for r in made for s in r.dialogue.skills} for made in rollouts.made]
    assert [max(ids) for ids in shown] == ["s-step0", "s-step1", "s-step2"], "never one step behind"
    for made in rollouts.made:
        for rollout in made:
            found = [s.id for s in rollout.dialogue.skills]
            assert len(found) <= 3
            assert found, rollout.job.text
    lines = [line for line in tc.metrics(place.folder) if "loss" in line]
    assert [line["bank_state"] for line in lines] == [1, 2, 3]
    assert all(line["skills_shown"] > 0 and line["skills_named"] == 0 for line in lines)
    kept = place.latest.bank
    assert kept == {"number": 3, "version": BankFolder(bank).head_at(3).version}
    LiveBank(bank).check_descends(kept)


def test_a_run_with_a_bank_that_is_continued_is_the_undisturbed_one(tmp_path: Path) -> None:
    folder = g.model_folder(tmp_path / "model")
    bank = bank_of(tmp_path / "bank", dataclasses.replace(skill("lung", "lung 0"), id="s-step0"))
    _, _, undisturbed = run_with(folder, tmp_path / "a", bank, teach=False)
    run_with(folder, tmp_path / "b", bank, stop_after=2, teach=False)
    place, _, continued = run_with(folder, tmp_path / "b", bank, resume=True, teach=False)
    assert place.latest.step == 3
    for name, weight in undisturbed.items():
        torch.testing.assert_close(continued[name], weight, rtol=1e-5, atol=1e-6)


# --- as it is typed


def said(toy: tc.Toy, *arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(train, [*arguments], env=toy.env, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return " ".join(str(done.output).split())


def test_sft_with_a_bank_goes_on_with_the_version_that_it_began_with(toy: tc.Toy, tmp_path: Path) -> None:
    reasoner = tc.tiny_reasoner(tmp_path / "banked")
    bank = bank_of(tmp_path / "bank", *SKILLS)
    line = tc.command(toy, reasoner, "--steps", "2", "--batch", "2", "--max_new_tokens", "4", "--set", "sft.evaluations=0")
    with_bank = [*line, "--bank", str(bank)]
    assert "Skills distractors" in said(toy, *with_bank, "--plan_only")
    assert "Done at step 2 of 2" in said(toy, *with_bank)
    bank_of(bank, skill("something new", "liver"))
    assert "is done: 2 of 2" in said(toy, *with_bank, "-c"), "the bank grew, the run's version is still there"
    assert "made from other bank" in said(toy, *line, "-c", code=1)
    assert "is no state of the version" in said(toy, *line, "--bank", str(bank_of(tmp_path / "other", LIVR)), "-c", code=1)


class Sounds:
    """An encoder to which everything that is asked of a liver sounds like bile."""

    identity = "sounds-1"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[1.0, 0.0] if "liv" in t or "bile" in t else [0.0, 1.0] for t in texts], np.float32)


def test_samples_are_shown_skills_that_are_found_by_meaning(toy: tc.Toy, tmp_path: Path) -> None:
    ground = ground_of(toy, **{"sft.skills_share": 1.0, "sft.skills_right": 1.0, "sft.skills_wrong": 0.0})
    bank = bank_of(tmp_path, skill("maker of bile", "liver"), skill("quax zorb", "spleen"))

    def dealt(encoder: Sounds | None) -> Counter[str]:
        frozen, live = open_frozen(bank, ground, encoder=encoder)
        return Counter(read_samples(ground, Lessons.planned(frozen, live, ground.plans, ground.targets.names)).dealt)

    assert dealt(None)["right"] == 0, "no word in common"
    assert dealt(Sounds())["right"] > 0
    live = LiveBank(bank, encoder=Sounds())
    assert [s.target for s in live.retrieve(Query("the livr, please"), 1)] == ["liver"]
    assert "sounds-1" in live.identity


def test_training_with_an_encoder_as_it_is_typed(toy: tc.Toy, tmp_path: Path, folder: Path) -> None:
    reasoner = tc.tiny_reasoner(tmp_path / "encoded")
    line = tc.command(toy, reasoner, "--steps", "2", "--batch", "2", "--max_new_tokens", "4", "--set", "sft.evaluations=0")
    with_bank = [*line, "--bank", str(bank_of(tmp_path / "bank", *SKILLS))]
    assert "Done at step 2 of 2" in said(toy, *with_bank, "--encoder", str(folder))
    assert "is done: 2 of 2" in said(toy, *with_bank, "--encoder", str(folder), "-c")
    assert "made from other encoder (tiny-" in said(toy, *with_bank, "-c", code=1)
    assert "name the bank with --bank" in said(toy, *line, "--encoder", str(folder), "--overwrite", code=2)
    assert "is no sentence encoder" in said(toy, *with_bank, "--encoder", str(tmp_path), "--overwrite", code=1)


def test_a_reward_by_name_or_file(toy: tc.Toy, tmp_path: Path) -> None:
    reasoner = tc.tiny_reasoner(tmp_path / "rewarded")
    line = tc.command(toy, reasoner, "--stage", "grpo", "--plan_only")
    assert "Reward 1 dice + 0.1 format" in said(toy, *line)
    assert "lambda 0.25 Reward 1 dice + 0.1 format" in said(toy, *line, "--reward", "seer/between", "--lambda", "0.25")
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"terms": {"dice": 0.7, "format": 0.3}}))
    assert "lambda 0 Reward 0.7 dice + 0.3 format" in said(toy, *line, "--reward", str(own))
    assert "There is no reward preset 'sear'. Did you mean seer" in said(toy, *line, "--reward", "sear", code=1)
    assert "does not exist" in said(toy, *line, "--reward", "nowhere.json", code=1)
    own.write_text(json.dumps({"terms": {"dise": 1}}))
    assert "no reward term 'dise'. Did you mean dice" in said(toy, *line, "--reward", str(own), code=1)
    sft = tc.command(toy, reasoner, "--plan_only", "--reward", "seer")
    assert "belongs to --stage grpo" in said(toy, *sft, code=2)

"""The bank mode "online": words are learnt where readings agree, never from one scan alone, and never into the bank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from prediction_cases import make_folder

from seerseg.cli.predict import predict
from seerseg.consensus import Consensus
from seerseg.episode import Episode
from seerseg.errors import BankError
from seerseg.evolution.online import FILE, OnlineBank
from seerseg.prompts import Prompt
from seerseg.protocols.base import Answer
from seerseg.skills.base import EmptyBank, Query, Skill
from seerseg.skills.retrieval import FrozenBank
from seerseg.skills.store import BankFolder
from seerseg.volume import Grid, Mask

GRID = Grid((2, 2, 2), np.eye(4))
KNOWN = Skill("", "MESSY_INPUT_REPAIR", "slang", "answer spleen", words=("quax",), target="spleen")


def episode(text: str, *answers: str, agreement: float = 1.0) -> Episode:
    mask = Mask(np.ones(GRID.shape_zyx, bool), GRID, answers[0])
    answer = Answer(answers[0], Prompt(text=answers[0]))
    return Episode(text, "ok", (), answer, mask, consensus=Consensus(agreement, tuple((text, a) for a in answers)))


def zorb(*answers: str, agreement: float = 1.0) -> Episode:
    return episode("please outline the zorb", *(answers or ("liver",) * 3), agreement=agreement)


def test_a_word_is_learnt_from_agreement_in_two_scans() -> None:
    bank = OnlineBank(FrozenBank.of([KNOWN]))
    identity = bank.identity
    assert bank.learn("a", "CT", [zorb()]) == 0
    assert bank.learn("a", "CT", [zorb(), zorb()]) == 0, "one scan is not enough"
    assert bank.learn("b", "CT", [zorb()]) == 1
    assert [s.target for s in bank.retrieve(Query("where is the zorb?", "CT"), 3)] == ["liver"]
    assert bank.retrieve(Query("where is the zorb?", "MR"), 3) == []
    assert [s.target for s in bank.retrieve(Query("quax or zorb", "CT"), 3)] == ["spleen", "liver"]
    assert (bank.mode, bank.identity) == ("online", identity)


@pytest.mark.parametrize(
    "said",
    [
        zorb("liver", "liver"),
        zorb("liver", "liver", "spleen"),
        zorb(agreement=0.89),
        episode("liver", *["liver"] * 3),
        episode("please outline this", *["liver"] * 3),
        Episode("please outline the zorb", "fault", (), None, None),
    ],
    ids=["two readings", "two answers", "masks that differ", "the name itself", "everyday words", "a fault"],
)
def test_what_teaches_nothing(said: Episode) -> None:
    bank = OnlineBank(EmptyBank())
    for case in "abc":
        bank.learn(case, "CT", [said])
    assert bank.learnt == ()


def test_a_word_that_is_contradicted_is_dropped_again() -> None:
    bank = OnlineBank(EmptyBank())
    for case in "ab":
        bank.learn(case, "CT", [zorb()])
    assert len(bank.learnt) == 1
    assert bank.learn("c", "CT", [zorb(*["spleen"] * 3)]) == 0
    assert bank.retrieve(Query("the zorb", "CT"), 3) == []


def test_what_was_learnt_is_read_again_and_orders_are_not_learnt(tmp_path: Path) -> None:
    bank = OnlineBank(EmptyBank(), tmp_path / FILE)
    bank.learn("a", "CT", [zorb(), episode("jailbreak zorbs", *["liver"] * 3)])
    again = OnlineBank(EmptyBank(), tmp_path / FILE)
    assert again.learn("b", "CT", [zorb()]) == 1
    assert "jailbreak" not in (tmp_path / FILE).read_text()
    with pytest.raises(BankError, match="to be told apart"):
        OnlineBank(FrozenBank.of([KNOWN], mode="transductive"))


def test_as_it_is_typed(tmp_path: Path) -> None:
    images = make_folder(tmp_path, 3)
    bank = BankFolder(tmp_path / "bank")
    bank.change(lambda now: {KNOWN.id: KNOWN}, "one")
    before = bank.head()
    line = ["-i", str(images), "-o", str(tmp_path / "out"), "--segmenter", f"scripted:{tmp_path / 'script.json'}", "-device", "cpu"]
    line += ["--bank", str(tmp_path / "bank"), "--prompt", "outline the livr", "--bank_mode", "online"]

    def run(*more: str, code: int) -> str:
        done = CliRunner().invoke(predict, [*line, *more], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done.output

    assert "add --consensus 3" in run(code=2)
    assert "cannot be shared" in run("--consensus", "3", "--num_parts", "2", code=2)
    assert "needs a bank to begin with" in run("--consensus", "3", "--bank", "none", code=2)
    run("--consensus", "3", code=0)
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("case*.json"))]
    assert {record["model"]["bank"] for record in records} == {"online"}
    shown = [len(record["requests"][0]["skills_shown"]) for record in records]
    assert shown == [0, 0, 1], "the third scan is shown what the first two agreed on"
    lines = (tmp_path / "out" / FILE).read_text().splitlines()
    assert json.loads(lines[1])["audit"]["origin"] == "online"
    assert bank.head() == before
    run("--consensus", "3", code=0)
    assert (tmp_path / "out" / FILE).read_text().splitlines() == lines, "what is done is not counted again"

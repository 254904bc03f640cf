"""seerseg_evolve with a language model that words skills and a sentence encoder that finds them."""

# ruff: noqa: F401, F811 - fixtures of other files

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from test_bank_commands import world
from test_make_requests_dataset import tiny_llama
from test_skill_encoder import folder

from seerseg.cli.evolve import evolve
from seerseg.cli.predict import predict
from seerseg.skills.store import BankFolder


def test_a_writer_that_babbles_and_an_encoder(world: dict[str, str], tmp_path: Path, tiny_llama: Path, folder: Path) -> None:
    env = {k: v for k, v in world.items() if k != "script"}
    line = ["7", "0", "--segmenter", world["script"], "--rounds", "1", "-o", str(tmp_path / "bank"), "--json"]
    line += ["--accept_in", "own"]  # an encoder that was taught nothing finds skills for what they do not fit in any other language
    done = CliRunner(env=env).invoke(evolve, [*line, "--writer", str(tiny_llama), "--encoder", str(folder)])
    assert done.exit_code == 0, done.output
    wording = json.loads(done.stdout)["wording"]
    assert (wording["writer"], wording["kept"]) == ("llama", 0)
    assert sum(wording["refused"].values()) >= 2
    learned = [s for s in BankFolder(tmp_path / "bank").skills().values() if s.status == "accepted"]
    assert {s.target for s in learned} == {"liver", "spleen"}
    assert all(s.when.startswith("the request says '") for s in learned), "the rule's words stay"
    scan = next((Path(env["seerseg_raw"]) / "Dataset007_Toy" / "imagesTr").glob("*.nii.gz"))
    asked = ["-i", str(scan), "-o", str(tmp_path / "out"), "--prompt", "draw the zorb", "--segmenter", world["script"], "-device", "cpu"]
    found = CliRunner().invoke(predict, [*asked, "--bank", str(tmp_path / "bank"), "--encoder", str(folder)])
    assert found.exit_code == 0, found.output
    assert list((tmp_path / "bank" / "embeddings").glob("tiny-*.npz"))
    record = json.loads(next((tmp_path / "out").glob("case*.json")).read_text())
    assert "tiny-" in record["model"]["bank_identity"]
    assert record["requests"][0]["skills_shown"]
    assert CliRunner().invoke(predict, [*asked, "--encoder", str(folder)]).exit_code == 2
    bad = CliRunner(env=env).invoke(evolve, [*line, "--writer", "nowhere"])
    assert (bad.exit_code, "is no writer" in bad.output) == (2, True)

"""nnU-Net lines as typed, spelling, and faults as sentences."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from seerseg.cli.options import command, json_option, option, print_json, several
from seerseg.errors import DatasetError, InterruptedRunError, NothingToDoError


@command("probe")
@click.argument("folders", nargs=-1)
@several("-d", "--dataset", help="Numbers.")
@several("-f", "--fold", type=int)
@option("-np", "--workers", type=int, default=1)
@option("-device", "--device", default="auto")
@option("--num_parts", type=int, default=1)
@option("--prompt", "prompts", multiple=True)
@option("--verify_dataset_integrity", is_flag=True)
@json_option
def probe(**values: object) -> None:
    """Say what was understood."""
    if values["prompts"] == ("fault",):
        raise DatasetError("The dataset is odd. Mend it.")
    if values["prompts"] == ("nothing",):
        raise NothingToDoError("The folder holds no image.")
    if values["prompts"] == ("signal",):
        raise InterruptedRunError("Stopped.")
    print_json(values)


def run(*args: str) -> dict[str, object]:
    import json

    result = CliRunner().invoke(probe, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_verbatim_nnunet_lines() -> None:
    read = run("-d", "4", "5", "-np", "2", "--verify_dataset_integrity")
    assert read["dataset"] == ["4", "5"]
    assert read["workers"] == 2
    assert read["verify_dataset_integrity"] is True
    read = run("-d", "Dataset004_Hippocampus", "-f", "0", "1", "2", "3", "4", "-device", "cuda")
    assert read["fold"] == [0, 1, 2, 3, 4]
    assert read["device"] == "cuda"


def test_underscores_and_hyphens_are_one() -> None:
    assert run("--num-parts", "3")["num_parts"] == run("--num_parts=3")["num_parts"] == run("-num_parts", "3")["num_parts"] == 3


def test_a_value_may_begin_with_a_dash_and_negative_numbers_are_values() -> None:
    assert run("--prompt", "-left lung")["prompts"] == ["-left lung"]
    assert run("-f", "-1", "0")["fold"] == [-1, 0]


def test_positionals_pass() -> None:
    assert run("gt", "pred", "-f", "1", "2")["folders"] == ["gt", "pred"]


@pytest.mark.parametrize(
    ("typed", "meant"), [("--promt", "--prompt"), ("-num_prts", "--num_parts"), ("--verify_dataset_integrty", "--verify_dataset_integrity")]
)
def test_a_mistyped_option_is_an_error_with_the_nearest_name(typed: str, meant: str) -> None:
    result = CliRunner().invoke(probe, [typed, "x"])
    assert result.exit_code == 2
    assert meant in result.output


def test_an_option_without_its_values_is_misuse() -> None:
    assert CliRunner().invoke(probe, ["-d", "-np", "2"]).exit_code == 2


@pytest.mark.parametrize(("prompt", "code"), [("fault", 1), ("nothing", 4), ("signal", 75)])
def test_faults_are_sentences_with_exit_codes(prompt: str, code: int) -> None:
    result = CliRunner().invoke(probe, ["--prompt", prompt])
    assert result.exit_code == code
    assert "Error: " in result.output
    assert "Traceback" not in result.output

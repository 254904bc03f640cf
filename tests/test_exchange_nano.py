"""What was trained from the shipped nano weights is opened as nano again, wherever it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import training_cases as tc
from click.testing import CliRunner

from seerseg.cli.predict import predict
from seerseg.cli.train import train
from seerseg.model import ModelSpec, find_run, open_model, read_spec, write_spec
from seerseg.prediction import Predictor, predict_folder
from seerseg.reasoners.nano import SHIPPED, NanoReasoner
from seerseg.training.tuning import opened_by, source_of

pytestmark = pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="the shipped weights are not in this checkout")


def run_train(toy: tc.Toy, *more: str) -> str:
    line = ["7", "0", "--segmenter", toy.segmenter, "-device", "cpu", *tc.SMALL, "--steps", "1", "--batch", "1", *more]
    done = CliRunner().invoke(train, line, env=toy.env, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tc.Toy:
    made = tc.make(tmp_path_factory.mktemp("toy"))
    run_train(made)
    return made


def fold(toy: tc.Toy) -> Path:
    return find_run(toy.root / "results", tc.NAME, 0)


def test_the_manifest_says_that_it_is_nano(toy: tc.Toy) -> None:
    folder = fold(toy)
    assert json.loads((folder / "manifest.json").read_text())["reasoner"] == "nano:sft/model"
    assert read_spec(folder).reasoner == f"nano:{folder / 'sft' / 'model'}"
    made = open_model(folder).reasoner
    assert isinstance(made, NanoReasoner)
    assert made.loaded.source.folder == folder / "sft" / "model"
    base = json.loads((folder / "sft" / "model" / "seerseg_base.json").read_text())
    assert base["name"] == "nano"
    assert str(SHIPPED) not in "".join(p.read_text() for p in folder.rglob("model/*.json"))


def test_predict_by_dataset_and_fold_is_predict_by_folder_also_when_it_was_moved(toy: tc.Toy, tmp_path: Path) -> None:
    images = toy.root / "raw" / tc.NAME / "imagesTr"
    one = tmp_path / "images"
    one.mkdir()
    shutil.copy(next(images.glob("case_0*")), one)
    line = ["-i", str(one), "-o", str(tmp_path / "a"), "--prompt", "the livr", "-d", "7", "-f", "0", "-device", "cpu", "--json"]
    done = CliRunner().invoke(predict, [*line, "--reasoner", "nano"], env=toy.env, catch_exceptions=False)
    assert done.exit_code in (0, 3), done.output
    said = json.loads(done.stdout)["model"]
    assert (said["reasoner"], said["dataset"], said["fold"]) == ("nano", tc.NAME, 0)
    # --reasoner chose among trained models: it is the trained one that answered, not the shipped one
    assert said["reasoner_identity"] == open_model(fold(toy)).reasoner.card.identity
    moved = tmp_path / "moved"
    shutil.copytree(fold(toy), moved, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    report = predict_folder(one, tmp_path / "b", Predictor(model_folder=moved, device="cpu"), prompts=["the livr"])
    assert report.model["identity"] == said["identity"]
    names = sorted(p.name for p in (tmp_path / "a").glob("case_0.*"))
    assert names == sorted(p.name for p in (tmp_path / "b").glob("case_0.*"))
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_adapters_of_nano_name_it_not_its_place(toy: tc.Toy, tmp_path: Path) -> None:
    toy = tc.Toy(toy.root)
    env = toy.env | {"seerseg_results": str(tmp_path / "results")}
    line = ["7", "0", "--segmenter", toy.segmenter, "-device", "cpu", *tc.SMALL, "--steps", "1", "--batch", "1", "--tuning", "lora"]
    done = CliRunner().invoke(train, line, env=env, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    folder = find_run(tmp_path / "results", tc.NAME, 0)
    config = json.loads((folder / "sft" / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "nano"
    made = open_model(folder).reasoner
    assert isinstance(made, NanoReasoner)
    assert made.loaded.source.adapter == folder / "sft" / "model"
    assert made.loaded.source.folder == SHIPPED


def test_names_of_reasoners_that_are_trained(toy: tc.Toy) -> None:
    assert opened_by("nano") == opened_by(f"nano:{SHIPPED}") == "nano:"
    assert opened_by("vlm:/a/b") == opened_by("/a/b") == opened_by("Qwen/Qwen3-VL-4B-Instruct") == ""
    assert source_of(f"nano:{SHIPPED}").folder == source_of("nano").folder == SHIPPED


def test_parts_inside_a_folder_are_named_from_it(tmp_path: Path) -> None:
    from seerseg.errors import ModelError

    real = tmp_path / "real"
    (real / "sft" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    spec = ModelSpec(reasoner=f"nano:{real / 'sft' / 'model'}", segmenter=f"medsam2:{tmp_path / 'elsewhere'}")
    write_spec(tmp_path / "link", spec)
    value = json.loads((real / "manifest.json").read_text())
    assert value["reasoner"] == "nano:sft/model"
    assert value["segmenter"] == f"medsam2:{tmp_path / 'elsewhere'}"
    assert read_spec(real).reasoner == f"nano:{real / 'sft' / 'model'}"
    for part in ("../x", "nano:../x", "nano:sft/../../x"):
        (real / "manifest.json").write_text(json.dumps({**value, "reasoner": part}))
        with pytest.raises(ModelError, match="points out of the model folder"):
            read_spec(real)
    for named, kind in (("nnunet:/models/organs?folds=0", "nnunet:"), ("/models/organs", ""), ("sam:org/organs", "sam:")):
        (real / "manifest.json").write_text(json.dumps({**value, "segmenter": named}))
        assert read_spec(real).segmenter == named
        (real / "base" / "segmenter" / "organs").mkdir(parents=True)  # what lies in the model's own folder is taken
        assert read_spec(real).segmenter == f"{kind}{real / 'base' / 'segmenter' / 'organs'}{'?folds=0' if '?' in named else ''}"
        shutil.rmtree(real / "base")

"""SFT: a run that is stopped and continued is the undisturbed run; what ends a run leaves a checkpoint and says what to lower."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_cases as tc
from transformers import TrainerCallback

from seerseg.errors import ModelError, OutputError, TrainingError, UsageError
from seerseg.model import read_spec
from seerseg.protocols import load_protocol
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.vlm_loading import Source
from seerseg.segmenters import load_segmenter
from seerseg.training.callbacks import Outside
from seerseg.training.data import Ground, open_ground, read_samples
from seerseg.training.runs import RunFolder
from seerseg.training.settings import TrainSettings, plans_for, settings_from
from seerseg.training.sft import Ended, train_sft
from seerseg.training.tuning import export, shape_of, source_of, wake

EDITS = {"views.count": 2, "views.size_px": 64, "sft.batch": 2, "validation.rows": 2, "validation.sets": 1, "sft.evaluations": 1}
STEPS = 4


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tc.Toy:
    return tc.make(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tiny(toy: tc.Toy) -> Source:
    """A reasoner that draws random numbers while it learns, so that random states matter."""
    folder = tc.tiny_reasoner(toy.root / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (folder / "config.json").write_text(json.dumps(config))
    return source_of(str(folder))


@pytest.fixture(scope="module")
def ground(toy: tc.Toy) -> Ground:
    plans = plans_for(toy.preprocessed, "plans", EDITS)
    return open_ground(toy.root / "raw" / tc.NAME, toy.preprocessed, 0, plans, load_protocol("seer"))


def settings_for(ground: Ground, source: Source, **changes: Any) -> TrainSettings:
    made = settings_from(
        ground.plans, "sft", parameters=shape_of(source).parameters, units=15, tuning="full", steps=STEPS, max_new_tokens=4,
        learning_rate=1e-3, micro_batch=1, dtype="float32",
    )  # fmt: skip
    return dataclasses.replace(made, **{"train_vision": True, "cache_bytes": 1 << 24, **changes})


@dataclasses.dataclass
class Stage:
    """Everything to train on."""

    toy: tc.Toy
    ground: Ground
    source: Source

    def train(self, root: Path, *callbacks: TrainerCallback, resume: bool = False, outside: Outside | None = None, drawn: bool = False,
              **changes: Any) -> Ended:  # fmt: skip
        settings = settings_for(self.ground, self.source, **changes)
        run = RunFolder(root, "sft")
        latest = run.begin(settings, {"plans": "p"}, resume=resume)
        return train_sft(
            run, self.ground, read_samples(self.ground), settings, self.source, load_segmenter(self.toy.segmenter) if drawn else None,
            resume_from=latest, outside=outside, callbacks=callbacks,
        )  # fmt: skip


@pytest.fixture(scope="module")
def stage(toy: tc.Toy, ground: Ground, tiny: Source) -> Stage:
    return Stage(toy, ground, tiny)


@pytest.fixture(scope="module")
def undisturbed(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert stage.train(root, drawn=True).how == "done"
    return root


def losses(root: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["loss"]) for m in tc.metrics(root / "sft") if "loss" in m]


def stop_after(count: int) -> Callable[[], bool]:
    asked = iter(range(10**6))
    return lambda: next(asked) >= count - 1


def test_the_run_says_what_it_did(undisturbed: Path) -> None:
    records = tc.metrics(undisturbed / "sft")
    assert [step for step, _ in losses(undisturbed)] == [1, 2, 3, 4]
    assert losses(undisturbed)[-1][1] < losses(undisturbed)[0][1]
    assert {"val_loss", "val_exact", "val_dice_worst", "seconds_data", "tokens", "grad_norm"} <= {
        key for record in records for key in record
    }
    run = RunFolder(undisturbed, "sft")
    assert run.finished
    assert run.best.score is not None
    assert list(run.tensorboard.glob("events*"))


def test_a_run_that_is_stopped_and_continued_is_the_undisturbed_run(stage: Stage, undisturbed: Path, tmp_path: Path) -> None:
    ended = stage.train(tmp_path, outside=Outside(stop=stop_after(2)), drawn=True)
    assert (ended.how, ended.step) == ("signal", 2)
    torch.manual_seed(99)
    np.random.seed(99)
    assert stage.train(tmp_path, resume=True, drawn=True).how == "done"
    assert losses(tmp_path) == losses(undisturbed)
    one, two = (tc.weights(RunFolder(root, "sft").latest.path) for root in (undisturbed, tmp_path))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_a_larger_micro_batch_is_the_same_run(stage: Stage, undisturbed: Path, tmp_path: Path) -> None:
    """Without the random numbers of dropout, which are drawn for another shape."""
    source = Source(tmp_path / "still", None, "still")
    import shutil

    shutil.copytree(stage.source.folder, source.folder)
    config = json.loads((source.folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.0
    (source.folder / "config.json").write_text(json.dumps(config))
    still = Stage(stage.toy, stage.ground, source)
    still.train(tmp_path / "one", steps=2)
    still.train(tmp_path / "two", steps=2, micro_batch=2, accumulation=1)
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_out_of_time_is_in_order_and_what_was_reached_can_be_the_best(stage: Stage, undisturbed: Path, tmp_path: Path) -> None:
    ended = stage.train(tmp_path, outside=Outside(max_minutes=1e-9), drawn=True)
    assert (ended.how, ended.step, ended.best.step) == ("time", 1, 1)
    assert ended.best.score is not None, "it was validated, though the plan validates later"
    assert stage.train(tmp_path, resume=True, drawn=True).how == "done"
    assert losses(tmp_path) == losses(undisturbed), "a validation between leaves no trace"


def test_the_last_step_is_validated(stage: Stage, tmp_path: Path) -> None:
    ended = stage.train(tmp_path, evaluate_steps=3)
    assert (ended.how, ended.step) == ("done", 4)
    assert [m["step"] for m in tc.metrics(tmp_path / "sft") if "val_loss" in m] == [3, 4]
    assert RunFolder(tmp_path, "sft").latest.score is not None


def test_a_gradient_that_is_no_number_is_not_applied(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"gradient of step \d is not a number; it was not applied. Lower the learning rate \(--lr"):
        stage.train(tmp_path, learning_rate=1e30)
    kept = RunFolder(tmp_path, "sft").latest
    assert kept is not None
    assert all(np.isfinite(w).all() for w in tc.weights(kept.path).values())


class At(TrainerCallback):
    """Does something before a step."""

    def __init__(self, step: int, what: Callable[[], Any]) -> None:
        self.step, self.what = step, what

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.what()


def test_too_little_memory_says_what_to_lower(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"Memory ran out in step 3. Lower, in this order: --micro_batch 1 \(now 2; the results stay"
    ) as told:
        stage.train(tmp_path, At(3, lambda: torch.empty(1 << 60)), micro_batch=2, accumulation=1)
    assert "The checkpoint of step 2 is whole" in str(told.value)
    assert RunFolder(tmp_path, "sft").latest.step == 2


@pytest.fixture
def small_files() -> Iterator[Callable[[], None]]:
    """From the call on no file may grow beyond 60 kB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(stage: Stage, tmp_path: Path, small_files: Callable[[], None]) -> None:
    stage.train(tmp_path, outside=Outside(stop=stop_after(1)), evaluate_steps=0)
    before = tc.weights(RunFolder(tmp_path, "sft").latest.path)
    with pytest.raises(OutputError, match=r"The checkpoint of step 4 could not be written to .* The checkpoint of step 1 is whole; free"):
        stage.train(tmp_path, At(3, small_files), resume=True, evaluate_steps=0)
    run = RunFolder(tmp_path, "sft")
    assert run.latest.step == 1
    assert not run.saving.exists()
    for name, weight in tc.weights(run.latest.path).items():
        np.testing.assert_array_equal(weight, before[name])


def test_adapters_learn_and_the_base_does_not(stage: Stage, tmp_path: Path) -> None:
    base = tc.weights(stage.source.folder)
    ended = stage.train(tmp_path, tuning="lora", lora_rank=4, train_vision=False, steps=1)
    run = RunFolder(tmp_path, "sft")
    saved = tc.weights(ended.best.path)
    assert saved
    assert all("lora_" in name and "visual" not in name for name in saved)
    export(run, ended.best, stage.source, stage.ground, segmenter="nano", segmenter_identity=None)
    made = load_reasoner(str(run.model))
    assert made.card.sees_images
    assert any(not np.array_equal(base[n], w.numpy()) for n, w in made.model.state_dict().items() if n in base)
    assert all(np.array_equal(base[n], w) for n, w in tc.weights(stage.source.folder).items())
    spec = read_spec(tmp_path)
    assert (spec.reasoner, spec.protocol, spec.targets, spec.closed) == (str(run.model), "seer", ("liver", "spleen"), True)


def test_adapters_on_another_base_are_refused(stage: Stage, tmp_path: Path) -> None:
    import tiny_vlms

    ended = stage.train(tmp_path, tuning="lora", lora_rank=4, steps=1)
    run = RunFolder(tmp_path, "sft")
    export(run, ended.best, stage.source, stage.ground, segmenter="nano", segmenter_identity=None)
    tiny_vlms.idefics3(run.model / "base")
    with pytest.raises(ModelError, match=r"was trained on the base model .* but .* holds other weights"):
        load_reasoner(str(run.model))


def test_layers_that_are_not_there(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lora.targets 'no_such_layer' does not fit this model"):
        stage.train(tmp_path, tuning="lora", lora_targets="no_such_layer")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "of type 'bert', which does not take images and text and write text"),
        ({"model_type": "no_such_thing"}, "cannot be read"),
    ],
)
def test_a_folder_that_is_no_image_text_to_text_model(tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=sentence):
        source_of(str(tmp_path))


def test_a_reasoner_of_rules_has_nothing_to_train() -> None:
    with pytest.raises(UsageError, match="The reasoner 'lexicon' has no weights that could be trained"):
        source_of("lexicon")


def test_shapes_are_read_without_weights(tiny: Source) -> None:
    shape = shape_of(tiny)
    model = load_reasoner(str(tiny.folder)).model
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.vision == sum(p.numel() for n, p in model.named_parameters() if "visual" in n)
    assert (shape.layers, shape.hidden, shape.patch_px, shape.merge) == (3, 32, 16, 2)


def test_tokens_that_were_never_learnt_are_told_apart_before_training() -> None:
    """Nano has marks for the fixed parts of other protocols' replies, which no text it learnt from has: their embeddings are one and the
    same, so that one is taken for another. Those alone are drawn anew, and once."""
    reasoner = load_reasoner("nano")
    table = reasoner.model.get_input_embeddings().weight
    before = table.detach().clone()
    words = ("anterior hippocampus", "posterior hippocampus, 3 4 5 6 7 8 9 0", "left lung right kidney liver spleen")
    plain = [token for text in words for token in reasoner.encode_reply(text)]
    reply = '<think></think><answer>[{"slice": 17, "bbox_2d_list": [[120, 340, 310, 520]]}]</answer>'
    marks = sorted(set(reasoner.encode_reply(reply)) - set(plain) - set(reasoner.encode_reply("17, 120, 340, 310, 520")))
    unit = torch.nn.functional.normalize(before[marks], dim=1)
    closest = (unit @ unit.T - 2 * torch.eye(len(marks))).amax(1)
    unlearnt = {mark for mark, cosine in zip(marks, closest.tolist(), strict=True) if cosine > 0.99}
    assert len(unlearnt) == 5  # think, /think, slice, boxes, end
    assert wake(reasoner.model, reasoner.encode_reply(reply), seed=0) == 0  # too few learnt ones to know how they spread
    torch.testing.assert_close(table, before, rtol=0, atol=0)
    assert wake(reasoner.model, [*plain, *reasoner.encode_reply(reply)], seed=0) == 5
    changed = {int(row) for row in (table != before).any(1).nonzero()}
    assert changed == unlearnt
    rows = torch.nn.functional.normalize(table[sorted(unlearnt)], dim=1)
    assert float((rows @ rows.T - 2 * torch.eye(5)).max()) < 0.6
    assert wake(reasoner.model, [*plain, *reasoner.encode_reply(reply)], seed=0) == 0

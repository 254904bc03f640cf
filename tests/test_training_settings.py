"""Settings follow from plans and options; the machine cuts the batch up and changes nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import raw_datasets as rd
from hypothesis import given
from hypothesis import strategies as st
from test_planning import LAPTOP, MACHINES

from seerseg.dataset import open_dataset
from seerseg.errors import PlanError, UsageError
from seerseg.planning import FINGERPRINT_FILE, Fingerprint, fingerprint, make_plans, save_fingerprint, save_plans
from seerseg.protocols import load_protocol
from seerseg.training.settings import (
    TrainSettings,
    fit_to_memory,
    load_settings,
    plans_for,
    read_edits,
    settings_from,
    views_of,
)


@pytest.fixture(scope="module")
def mr(tmp_path_factory: pytest.TempPathFactory) -> Fingerprint:
    return fingerprint(open_dataset(rd.make(tmp_path_factory.mktemp("mr"))))


@pytest.fixture
def folder(mr: Fingerprint, tmp_path: Path) -> Path:
    place = tmp_path / "Dataset001_Toy"
    save_fingerprint(mr, place / FINGERPRINT_FILE)
    save_plans(make_plans(mr, LAPTOP), place)
    return place


def test_small_models_are_trained_whole_and_large_ones_get_adapters(mr: Fingerprint) -> None:
    plans = make_plans(mr, LAPTOP)
    nano, middle, large = (settings_from(plans, "sft", parameters=n, units=80) for n in (7_000_000, 200_000_000, 4_000_000_000))
    assert [s.tuning for s in (nano, middle, large)] == ["full", "full", "lora"]
    assert [s.learning_rate for s in (nano, middle, large)] == [3e-4, 1e-5, 1e-4]
    assert settings_from(plans, "sft", parameters=7_000_000, units=80, tuning="lora").learning_rate == 1e-4
    assert (large.lora_rank, large.lora_alpha) == (plans.value("lora.rank"), 2 * plans.value("lora.rank"))
    assert [s.quantize for s in (nano, large)] == ["none", "none"]


def test_what_a_protocol_changes(mr: Fingerprint) -> None:
    plans = make_plans(mr, LAPTOP)

    def of(name: str, parameters: int = 7_000_000, **edits: object) -> TrainSettings:
        edited = make_plans(mr, LAPTOP, previous=plans.edited(edits)) if edits else plans
        return settings_from(edited, "sft", parameters=parameters, units=80, protocol=load_protocol(name))

    assert plans.value("lora.vision") == "frozen"
    assert [of(name).train_vision for name in ("seer", "medvol-r1", "medsam-agent", "seerseg")] == [False, True, True, True]
    assert not of("medvol-r1", 4_000_000_000).train_vision
    assert of("seer").max_tokens == plans.value("tokens.budget")
    words = plans.value("tokens.budget") - plans.value("tokens.images")
    shown, reply = 16 * 16, plans.value("tokens.completion")  # 512 px
    whole = words + 15 * shown + 4 * (reply + 3 * (shown + 64))
    assert of("medsam-agent").max_tokens == -(-whole // 64) * 64
    assert of("medvol-r1").max_tokens == -(-(words + 64 * 8 * 8) // 64) * 64


def test_steps_follow_from_the_data(mr: Fingerprint) -> None:
    plans = make_plans(mr, LAPTOP)
    sft = settings_from(plans, "sft", parameters=1, units=81)
    assert (sft.batch, sft.steps) == (8, 31)  # 3 passes over 81 samples, 8 at a time
    assert (sft.warmup_steps, sft.evaluate_steps, sft.schedule) == (2, 3, "cosine")
    grpo = settings_from(plans, "grpo", parameters=1, units=20)
    assert (grpo.steps, grpo.batch, grpo.group) == (10, 64, 8)  # 4 passes over 20 sets, 8 sets of 8 replies an update
    assert settings_from(plans, "sft", parameters=1, units=81, steps=5).epochs == pytest.approx(5 * 8 / 81)


def test_the_machine_changes_the_cut_alone(mr: Fingerprint) -> None:
    made = [settings_from(make_plans(mr, machine), "sft", parameters=10**9, units=100) for machine in MACHINES]
    assert len({s.identity for s in made}) == 1
    assert len({(s.micro_batch, s.dtype) for s in made}) > 2
    assert made[0].differences(made[-1]) == []
    other = dataclasses.replace(made[0], learning_rate=1.0)
    assert made[0].differences(other) == [f"learning_rate ({made[0].learning_rate}, not 1.0)"]


@given(batch=st.integers(1, 64), processes=st.integers(1, 9), micro=st.integers(1, 80))
def test_any_cut_keeps_the_batch(mr: Fingerprint, batch: int, processes: int, micro: int) -> None:
    plans = make_plans(mr, LAPTOP, previous=make_plans(mr, LAPTOP).edited({"sft.batch": batch}))
    if batch % processes:
        with pytest.raises(UsageError, match=f"{processes} processes cannot share a batch of {batch}"):
            settings_from(plans, "sft", parameters=1, units=10, processes=processes, micro_batch=micro)
    else:
        made = settings_from(plans, "sft", parameters=1, units=10, processes=processes, micro_batch=micro)
        assert made.micro_batch * made.accumulation * processes == batch
        assert made.micro_batch <= micro


def test_passes_shrink_until_they_fit(mr: Fingerprint) -> None:
    made = settings_from(make_plans(mr, MACHINES[-1]), "sft", parameters=1, units=10, processes=1, micro_batch=8)
    need = {m: m * 100 for m in (1, 2, 4, 8)}
    assert [fit_to_memory(made, need, size).micro_batch for size in (10_000, 500, 230, 120, 5)] == [8, 4, 2, 1, 1]
    assert fit_to_memory(made, need, 230).accumulation == 4


def test_edits_from_the_command_line(folder: Path) -> None:
    plans = plans_for(folder, "plans", read_edits({"views.count": "2", "views.window": "volume", "paraphrases.count": "3"}), LAPTOP)
    assert plans.view_spec().count == 2
    assert plans.value("tokens.images") == 2 * plans.value("tokens.per_slice")
    assert plans.value("grpo.batch") == 3 * 2 * 8
    assert json.loads((folder / "plans.json").read_text())["mathematics"]["views.count"]["value"] == 8, "the file stays as it was"


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        ({"views.cuont": 2}, r"hold no value 'views.cuont'. Did you mean views.count"),
        ({"views.count": 0}, "views.count cannot be 0: it must be a whole number from 1"),
        ({"grpo.lambda": 0.9}, "from 0 to 0.5"),
        ({"grpo.batch": 7}, "grpo.batch is 7, but"),
    ],
)
def test_edits_that_cannot_be(folder: Path, edits: dict[str, float], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        plans_for(folder, "plans", edits, LAPTOP)


def test_plans_that_are_not_there(folder: Path) -> None:
    with pytest.raises(PlanError, match=r"There is no .*other\.json. Run seerseg_plan_and_preprocess"):
        plans_for(folder, "other", None, LAPTOP)


def test_views_of_a_protocol_with_its_own(mr: Fingerprint) -> None:
    plans = make_plans(mr, LAPTOP, previous=make_plans(mr, LAPTOP).edited({"views.plane": "coronal"}))
    assert views_of(plans, load_protocol("seer")) == plans.view_spec()
    shown = views_of(plans, load_protocol("medsam-agent"))
    assert (shown.plane, shown.size_px, sorted(shown.also)) == ("coronal", 512, ["axial", "sagittal"])


def test_round_trip_and_damage(mr: Fingerprint, tmp_path: Path) -> None:
    made = settings_from(make_plans(mr, LAPTOP), "sft", parameters=1, units=10)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(made.to_json()))
    assert load_settings(path) == made
    path.write_text(json.dumps({**made.to_json(), "surplus": 1}))
    with pytest.raises(PlanError, match=r"settings\.json is damaged or of another version"):
        load_settings(path)
    with pytest.raises(PlanError, match="here is damaged"):
        TrainSettings.from_json([], "here")

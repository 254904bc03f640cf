"""Two processes (gloo) come to what one comes to: with groups that lie across both, and with weights that they share."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsdp_on_cpu
import numpy as np
import pytest

HERE = Path(__file__).resolve()
LOGGED = ("reward", "dice_mean", "dice_worst", "dice_std", "zero_spread", "completions/mean_length", "eval_dice_worst", "eval_dice_std")
LENGTHS = {0: (12, 3, 7, 1), 1: (2,)}
"""Tokens of the replies that each process draws, one after the other."""


def steps(folder: Path, out: Path, how: str, protocol: str, tuning: str) -> None:
    """One process of a training: two steps of 16 replies; the first writes its weights and what was logged."""
    import grpo_scenes as g
    import torch

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if how == "fsdp":
        fsdp_on_cpu.begin()
    more: dict[str, Any] = {"deepspeed": zero3()} if how == "zero3" else {}
    torch.manual_seed(7)
    loaded = g.loaded_model(folder, lora=tuning == "lora")
    rollouts = g.rollouts_of(loaded, {"letters": g.Letters, "turns": g.Turns}[protocol]())
    trainer = g.trainer_of(
        loaded, out, rollouts, steps=2, paraphrases=2, samples=4, micro=4 // processes, accumulation=4, beta=0.05, val=g.SETS[:3],
        evaluate_steps=2, ddp_backend="gloo" if processes > 1 else None, **more,
    )  # fmt: skip
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    logs = {f"log {k}": torch.tensor([float(e[k]) for e in trainer.state.log_history if k in e], dtype=torch.float64) for k in LOGGED}
    write(out, {**logs, **weights})


def zero3() -> dict[str, Any]:
    """A configuration of DeepSpeed that shares every weight, on a CPU."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)  # nothing is compiled for a test
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    shared = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {**auto, "zero_optimization": shared, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def replies(folder: Path, out: Path, how: str, tuning: str) -> None:
    """Replies of unlike lengths and numbers, then a forward pass of all and what became of the weights."""
    import grpo_scenes as g
    import torch
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor

    from seerseg.reasoners.decoding import Decoding
    from seerseg.reasoners.vlm import VlmReasoner
    from seerseg.training.whole import whole

    torch.manual_seed(7)
    loaded = g.loaded_model(folder, lora=tuning == "lora")
    model = loaded.model.eval()
    mine = [length for lengths in LENGTHS.values() for length in lengths]
    if how == "fsdp":
        fsdp_on_cpu.begin()
        accelerator = Accelerator(cpu=True)
        model, _ = accelerator.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
        mine = list(LENGTHS[accelerator.process_index])
    else:
        accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None))  # type: ignore[assignment]
    base = model.get_base_model() if tuning == "lora" else model
    layer = base.model.language_model.layers[1]
    trainer = SimpleNamespace(accelerator=accelerator, is_fsdp_enabled=how == "fsdp", model=model)
    said: list[str] = []
    for _ in range(2):  # the weights are shared, and had in one piece, again and again
        with torch.no_grad(), whole(trainer):
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            for tokens in mine:
                views = g.Scenes().views("a")
                reasoner = VlmReasoner(g.replace(loaded, model=base), Decoding(max_new_tokens=tokens))
                said += [r for (r,) in reasoner.reply([g.Letters().opening(views, text, (), ()) for text in g.SETS[0].texts])]
        with torch.no_grad():
            logits = model(input_ids=torch.arange(20, 30)[None]).logits
        assert all(isinstance(p, DTensor) for p in layer.parameters()) == (how == "fsdp"), "after a pass its weights are let go again"
    write(out, {"logits": logits, f"said {os.environ.get('RANK', '0')}": torch.tensor([ord(c) for c in "\n".join(said)])}, every=True)


def write(out: Path, tensors: dict[str, Any], *, every: bool = False) -> None:
    from safetensors.torch import save_file

    rank = int(os.environ.get("RANK", "0"))
    if every or rank == 0:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, out / f"{rank}.st")


def end_of(folder: Path, out: Path, processes: int, work: str, *said: str) -> list[dict[str, np.ndarray]]:
    """What each of the processes wrote. said: how weights are held, then what the work wants to know."""
    from safetensors.numpy import load_file

    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(HERE.parent)}
    env |= {"fsdp": fsdp_on_cpu.ENV, "zero3": {"DS_ACCELERATOR": "cpu"}}.get(said[0], {})
    line = [sys.executable, str(HERE), work, str(folder), str(out), *said]
    several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{"RANK": str(n), "LOCAL_RANK": str(n), **several} if processes > 1 else {} for n in range(processes)]
    made = [subprocess.Popen(line, env={**env, **rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in ranks]
    told = [process.communicate(timeout=900)[0] for process in made]
    assert all(process.returncode == 0 for process in made), "\n".join(told)[-3000:]
    return [load_file(path) for path in sorted(out.glob("*.st"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import grpo_scenes as g

    return g.model_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "protocol", "tuning"),
    [
        ("ddp", "letters", "full"),
        ("ddp", "turns", "full"),
        ("fsdp", "turns", "full"),
        ("fsdp", "letters", "lora"),
        ("zero3", "turns", "full"),
        ("zero3", "letters", "lora"),
    ],
)
def test_two_processes_come_to_what_one_comes_to(folder: Path, tmp_path: Path, how: str, protocol: str, tuning: str) -> None:
    if how == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (DS_BUILD_OPS=0 pip install deepspeed)")
    (one,) = end_of(folder, tmp_path / "1", 1, "steps", "alone", protocol, tuning)
    (two,) = end_of(folder, tmp_path / "2", 2, "steps", how, protocol, tuning)
    assert one.keys() == two.keys()
    for name, value in one.items():
        near = {"rtol": 1e-4, "atol": 1e-5} if name.startswith("log") else {"rtol": 0, "atol": 2e-6}
        np.testing.assert_allclose(two[name], value, **near, err_msg=name)
    assert one["log dice_mean"].size == 2
    assert one["log eval_dice_worst"].size >= 1


@pytest.mark.parametrize("tuning", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_shared_weights_answer_at_each_process_s_own_pace(folder: Path, tmp_path: Path, tuning: str) -> None:
    (alone,) = end_of(folder, tmp_path / "1", 1, "replies", "alone", tuning)
    first, second = end_of(folder, tmp_path / "2", 2, "replies", "fsdp", tuning)
    np.testing.assert_allclose(first["logits"], alone["logits"], rtol=1e-5, atol=1e-5)
    whole = "".join(map(chr, alone["said 0"])).split("\n")
    mine = ["".join(map(chr, part[f"said {rank}"])).split("\n") for rank, part in enumerate((first, second))]
    size = 3 * len(LENGTHS[0])
    for turn in range(2):
        start = turn * (size + 3)
        assert mine[0][turn * size : (turn + 1) * size] == whole[start : start + size]
        assert mine[1][turn * 3 : (turn + 1) * 3] == whole[start + size : start + size + 3]


def test_fsdp_of_version_1_is_refused() -> None:
    from seerseg.errors import UsageError
    from seerseg.training.whole import check_gathers, refusal

    plugins = [SimpleNamespace(fsdp_version=version) for version in (1, 2)]
    states = [SimpleNamespace(fsdp_plugin=plugin) for plugin in plugins]
    first, second = (SimpleNamespace(accelerator=SimpleNamespace(state=state), is_fsdp_enabled=True) for state in states)
    with pytest.raises(UsageError, match="fsdp_version to 2"):
        check_gathers(first)
    assert refusal(second) is None


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    {"steps": steps, "replies": replies}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])

"""Two processes (gloo) come to what one comes to, with groups that lie across both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve()


def worker(folder: Path, out: Path, protocol: str) -> None:
    """One process: two steps of 16 replies; the first writes its weights and what was logged."""
    import grpo_scenes as g
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    loaded = g.loaded_model(folder)
    rollouts = g.rollouts_of(loaded, {"letters": g.Letters, "turns": g.Turns}[protocol]())
    trainer = g.trainer_of(
        loaded, out, rollouts, steps=2, paraphrases=2, samples=4, micro=4 // processes, accumulation=4, beta=0.05, val=g.SETS[:3],
        evaluate_steps=2, ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        logs = {k: torch.tensor([float(e[k]) for e in trainer.state.log_history if k in e], dtype=torch.float64) for k in LOGGED}
        save_file(
            {f"log {k}": v for k, v in logs.items()} | {k: v.contiguous() for k, v in loaded.model.state_dict().items()}, out / "end.st"
        )


LOGGED = ("reward", "dice_mean", "dice_worst", "dice_std", "zero_spread", "completions/mean_length", "eval_dice_worst", "eval_dice_std")


def end_of(folder: Path, out: Path, processes: int, protocol: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(HERE.parent)}
    line = [sys.executable, str(HERE), str(folder), str(out), protocol]
    several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{"RANK": str(n), "LOCAL_RANK": str(n), **several} if processes > 1 else {} for n in range(processes)]
    made = [subprocess.Popen(line, env={**env, **rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in ranks]
    said = [process.communicate(timeout=900)[0] for process in made]
    assert all(process.returncode == 0 for process in made), "\n".join(said)[-3000:]
    return load_file(out / "end.st")


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["letters", "turns"])
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path, protocol: str) -> None:
    import grpo_scenes as g

    folder = g.model_folder(tmp_path / "model")
    one, two = (end_of(folder, tmp_path / str(n), n, protocol) for n in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert one["log dice_mean"].size == 2
    assert one["log eval_dice_worst"].size >= 1


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

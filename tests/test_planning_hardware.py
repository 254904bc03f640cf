"""What a process may use: affinity, cgroups of both versions, Slurm, GPUs; no machine of a given kind is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from seerseg.planning import Gpu, Hardware, hardware

GIB = 1 << 30
A100 = "NVIDIA A100-SXM4-80GB, 81920, 8.0\n"


def machine(root: Path, files: dict[str, str] | None = None, *, affinity: int = 16, gpus: str = "", **environ: str) -> Hardware:
    for name, text in {"proc/meminfo": "MemTotal:       67108864 kB\nMemFree: 1 kB\n", **(files or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return hardware(environ, root, affinity, lambda: gpus)


def test_a_plain_machine(tmp_path: Path) -> None:
    assert machine(tmp_path) == Hardware(16, 64 * GIB, (), "CPU affinity", "memory of the machine", None)


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = hardware({}, tmp_path, 0, lambda: "")
    assert (found.cpus, found.ram_bytes) == (1, 4 * GIB)


def test_cgroup_v2_of_a_container(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "350000 100000\n", "sys/fs/cgroup/memory.max": f"{8 * GIB}\n"}
    found = machine(tmp_path, files)
    assert (found.cpus, found.cpus_from, found.ram_bytes, found.ram_from) == (3, "cgroup CPU quota", 8 * GIB, "cgroup memory.max")


def test_cgroup_v2_of_a_job_counts_its_ancestors(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/system.slice/job_7/step_0\n",
        "sys/fs/cgroup/system.slice/job_7/step_0/cpu.max": "max 100000\n",
        "sys/fs/cgroup/system.slice/job_7/step_0/memory.max": "max\n",
        "sys/fs/cgroup/system.slice/job_7/cpu.max": "400000 100000\n",
        "sys/fs/cgroup/system.slice/job_7/memory.max": f"{12 * GIB}\n",
    }
    found = machine(tmp_path, files)
    assert (found.cpus, found.ram_bytes) == (4, 12 * GIB)


def test_cgroup_v1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/slurm/job_7\n1:cpu,cpuacct:/slurm/job_7\n0::/\n",
        "sys/fs/cgroup/cpu/slurm/job_7/cpu.cfs_quota_us": "600000\n",
        "sys/fs/cgroup/cpu/slurm/job_7/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": f"{6 * GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    }
    found = machine(tmp_path, files)
    assert (found.cpus, found.ram_bytes) == (6, 6 * GIB)


def test_a_quota_below_one_processor(tmp_path: Path) -> None:
    assert machine(tmp_path, {"sys/fs/cgroup/cpu.max": "50000 100000\n"}).cpus == 1


@pytest.mark.parametrize(
    ("environ", "cpus", "gib"),
    [
        ({"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "12"}, 6, 64),
        ({"SLURM_CPUS_ON_NODE": "12"}, 12, 64),
        ({"SLURM_JOB_CPUS_PER_NODE": "8(x2),4"}, 8, 64),
        ({"SLURM_CPUS_PER_TASK": "64"}, 16, 64),
        ({"SLURM_MEM_PER_NODE": "8192"}, 16, 8),
        ({"SLURM_MEM_PER_NODE": "32G"}, 16, 32),
        ({"SLURM_MEM_PER_NODE": "0"}, 16, 64),
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_PER_TASK": "4"}, 4, 8),
        ({"SLURM_CPUS_PER_TASK": "many"}, 16, 64),
        ({"SLURM_MEM_PER_GPU": "8G", "SLURM_GPUS_ON_NODE": "2"}, 16, 16),
    ],
)
def test_slurm(tmp_path: Path, environ: dict[str, str], cpus: int, gib: int) -> None:
    found = machine(tmp_path, **environ)
    assert (found.cpus, found.ram_bytes) == (cpus, gib * GIB)


def test_job_end(tmp_path: Path) -> None:
    assert machine(tmp_path, SLURM_JOB_END_TIME="1790000000").job_end == 1790000000


def test_gpus(tmp_path: Path) -> None:
    assert machine(tmp_path, gpus=A100 * 2).gpus == (Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB, (8, 0)),) * 2
    assert machine(tmp_path, gpus="NVIDIA-SMI has failed because it could not communicate\n").gpus == ()
    assert machine(tmp_path, gpus="Tesla K80, 11441\n").gpus == (Gpu("Tesla K80", 11441 << 20, (0, 0)),)


@pytest.mark.parametrize(
    ("visible", "names"),
    [("0,2", ["a", "c"]), ("", []), ("-1", []), ("1,9,0", ["b"]), ("NoDevFiles", []), ("GPU-aa,GPU-bb", ["a", "b"])],
)
def test_only_visible_gpus_count(tmp_path: Path, visible: str, names: list[str]) -> None:
    found = machine(tmp_path, gpus="a, 100, 8.0\nb, 200, 8.0\nc, 300, 8.0\n", CUDA_VISIBLE_DEVICES=visible)
    assert [gpu.name for gpu in found.gpus] == names


def test_this_machine() -> None:
    found = hardware()
    assert found.cpus >= 1
    assert found.ram_bytes > 1 << 28
    assert found.cpus_from
    assert found.ram_from

"""One thread per test process (cores are shared), no model hub, and the folder of development scans where there is one."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
for variable in ("seerseg_raw", "seerseg_preprocessed", "seerseg_results"):
    os.environ.pop(variable, None)

import pytest  # noqa: E402  (the variables above must be set first)
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "seerseg", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("seerseg")

DEVELOPMENT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def development_data() -> Path:
    """Real scans that lie beside the project on some machines; tests that want them skip elsewhere."""
    if not DEVELOPMENT_DATA.is_dir():
        pytest.skip(f"the development scans are not here ({DEVELOPMENT_DATA.name} folder beside the project)")
    return DEVELOPMENT_DATA


@pytest.fixture(scope="session")
def ct_chest() -> Path:
    """The folder of slicerio that holds CTChest4.nrrd and Segmentation.seg.nrrd."""
    from importlib.util import find_spec

    spec = find_spec("slicerio")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package slicerio, which carries the CT chest, is not installed")
    return Path(spec.submodule_search_locations[0]) / "data"

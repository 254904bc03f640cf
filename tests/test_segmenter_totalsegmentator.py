"""TotalSegmentator behind the seam, against a stand-in of its Python API: names, subsets, geometry, and what is refused."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from segmenter_contract import SegmenterContract, blob, scene

from seerseg.errors import MissingExtraError, ModelError, SegmenterError, UsageError, WeightsError
from seerseg.prompts import Prompt
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.base import Segmenter
from seerseg.segmenters.totalsegmentator import TotalSegmentator, TotalSegmentatorApi, TotalSegmentatorOptions, _models

TOTAL = {1: "spleen", 2: "kidney_right", 3: "kidney_left", 5: "liver", 10: "lung_upper_lobe_left", 11: "lung_lower_lobe_left",
         12: "lung_upper_lobe_right", 13: "lung_middle_lobe_right", 14: "lung_lower_lobe_right", 27: "vertebrae_L5"}  # fmt: skip
CLASSES = {"total": TOTAL, "total_mr": {1: "spleen", 10: "lung_left"}, "body": {1: "body_trunc"}, "tissue_types": {1: "torso_fat"}}


class StandIn:
    """Draws every class of the task (or subset) in a slab of the bright voxels; counts its runs."""

    def __init__(self, *, turned: bool = False, coarse: bool = False, fault: BaseException | None = None) -> None:
        self.runs: list[dict[str, Any]] = []
        self.silenced = 0
        self.turned, self.coarse, self.fault = turned, coarse, fault

    def totalsegmentator(
        self, input: Any, output: Any = None, ml: bool = False, nr_thr_saving: int = 6, fast: bool = False, preview: bool = False,
        task: str = "total", roi_subset: Any = None, statistics: bool = False, radiomics: bool = False, quiet: bool = False,
        skip_saving: bool = False, device: str = "gpu", fastest: bool = False, roi_subset_robust: Any = None,
    ) -> Any:  # fmt: skip
        """The arguments of version 2.18 that the adapter gives, with their defaults."""
        import nibabel
        from nibabel.orientations import axcodes2ornt, ornt_transform

        print("Using Device: cpu")  # noqa: T201  as the package does
        assert self.silenced
        assert ml
        assert skip_saving
        assert output is None
        assert not statistics
        subset = roi_subset_robust if roi_subset_robust is not None else roi_subset
        assert subset is None or type(subset) is list
        assert subset is None or task.startswith("total")
        self.runs.append({"subset": subset, "device": device, "fast": fast, "robust": roi_subset_robust is not None})
        if self.fault is not None:
            raise self.fault
        array = np.asarray(input.dataobj)
        made = np.zeros(array.shape, np.uint8)
        slab = np.arange(array.shape[2])[None, None, :] % len(CLASSES[task])
        for number, (value, name) in enumerate(CLASSES[task].items()):
            if subset is None or name in subset:
                made[(slab == number) & (array > 100)] = value
        image = nibabel.Nifti1Image(made, input.affine)
        if self.turned:
            image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("PIR")))
        return image.slicer[::2] if self.coarse else image


def api(stand_in: StandIn, **changed: Any) -> TotalSegmentatorApi:
    def silence() -> None:
        stand_in.silenced += 1

    made = TotalSegmentatorApi(
        run=stand_in.totalsegmentator,
        classes=CLASSES,
        licensed=frozenset({"tissue_types"}),
        silence=silence,
        weights=lambda model: Path(__file__).parent,
        models=lambda task, options: [291],
        version="2.18.0",
    )
    return replace(made, **changed)


class TestContract(SegmenterContract):
    texts = ("lungs", "kidney")
    examples = 5

    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls) -> Segmenter:
        return TotalSegmentator(api(StandIn(turned=True)))


def texts(segmenter: Segmenter, *asked: str) -> list[Any]:
    return segmenter.segment(scene(), [Prompt(text=text) for text in asked])


def test_names_are_canonical_and_parts_make_wholes() -> None:
    segmenter = TotalSegmentator(api(StandIn()))
    names = segmenter.capabilities.vocabulary
    assert {"left kidney", "spleen", "liver", "left lung", "right lung"} <= set(names)
    assert "ribs" not in names
    assert segmenter.capabilities.modalities == ("CT",)
    assert TotalSegmentator(api(StandIn()), "total_mr").capabilities.modalities == ("MR",)
    left, right, lungs, kidneys = texts(segmenter, "left lung", "right lung", "lungs", "kidneys")
    assert (lungs.mask.array == left.mask.array | right.mask.array).all()
    assert not (left.mask.array & right.mask.array).any()
    assert kidneys.status == "ok"
    unknown = texts(segmenter, "pituitary gland")[0]
    assert unknown.status == "unsupported"
    assert unknown.nearest


def test_a_request_is_one_run_of_its_own_subset_and_is_remembered() -> None:
    stand_in = StandIn()
    segmenter = TotalSegmentator(api(stand_in))
    first = texts(segmenter, "liver", "left lung", "the liver")
    assert [run["subset"] for run in stand_in.runs] == [["liver"], ["lung_upper_lobe_left", "lung_lower_lobe_left"]]
    again = texts(segmenter, "left lung")
    assert len(stand_in.runs) == 2
    assert (again[0].mask.array == first[1].mask.array).all()


def test_without_subsets_everything_is_one_run() -> None:
    for task, options in (("total", TotalSegmentatorOptions(subset=False)), ("body", TotalSegmentatorOptions())):
        stand_in = StandIn()
        segmenter = TotalSegmentator(api(stand_in), task, options)
        texts(segmenter, *segmenter.capabilities.vocabulary)
        assert [run["subset"] for run in stand_in.runs] == [None]


def test_options_reach_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    stand_in = StandIn()
    texts(TotalSegmentator(api(stand_in), "total", TotalSegmentatorOptions(fast=True, robust=True), device="cuda:1"), "liver")
    assert stand_in.runs == [{"subset": ["liver"], "device": "gpu:1", "fast": True, "robust": True}]
    assert capsys.readouterr().out == ""
    made = [
        TotalSegmentator(api(stand_in), "total", options) for options in (TotalSegmentatorOptions(), TotalSegmentatorOptions(fast=True))
    ]
    assert made[0].card.identity != made[1].card.identity


@pytest.mark.parametrize("kind", ["plain", "oblique", "sheared"])
def test_masks_come_back_on_the_volume_s_own_grid(kind: str) -> None:
    volume = scene(kind)
    straight, turned, coarse = (
        TotalSegmentator(api(made)).segment(volume, [Prompt(text="liver")])[0].mask.array
        for made in (StandIn(), StandIn(turned=True), StandIn(coarse=True))
    )
    assert straight.any()
    assert (straight == turned).all()
    assert 2 * (straight & coarse).sum() > 0.8 * (straight.sum() + coarse.sum())
    assert (straight & blob()).sum() > 0.9 * straight.sum()


def test_a_licensed_task_runs_where_its_licence_is_accepted() -> None:
    made = TotalSegmentator(api(StandIn()), "tissue_types", accept_license=True)
    assert texts(made, "torso_fat")[0].status == "ok"
    assert "totalseg_set_license" in made.card.weights_licence


def test_what_it_cannot_do_is_a_sentence() -> None:
    for given, fault, said in (
        (("tissue_types",), ModelError, "licence"),
        (("totl",), UsageError, "Did you mean total"),
        (("body", TotalSegmentatorOptions(robust=True)), UsageError, "crops only"),
        (("total", TotalSegmentatorOptions(fast=True, fastest=True)), UsageError, "not both"),
    ):
        with pytest.raises(fault, match=said):
            TotalSegmentator(api(StandIn()), *given)
    with pytest.raises(UsageError, match="no device"):
        TotalSegmentator(api(StandIn()), device="gpu")
    with pytest.raises(WeightsError, match="totalseg_download_weights"):
        TotalSegmentator(api(StandIn(), weights=lambda model: Path("nowhere")))
    assert TotalSegmentator(api(StandIn(), weights=lambda model: Path("nowhere")), offline=False)
    single = TotalSegmentator(api(StandIn())).segment(scene(shape=(1, 40, 44)), [Prompt(text="liver")])[0]
    assert "single slice" in single.message
    for raised, fault in ((SystemExit(1), ModelError), (RuntimeError("CUDA out of memory"), SegmenterError)):
        with pytest.raises(fault, match=r"TotalSegmentator .*\."):
            texts(TotalSegmentator(api(StandIn(fault=raised))), "liver")


def test_the_models_of_a_task_include_those_that_find_its_crop() -> None:
    tasks = {
        "total": {"sub_modes": {"fast": {"task_id": 297}, "default": {"task_id": [291, 292]}}},
        "total_mr": {"sub_modes": {"default": {"task_id": [850]}}},
        "body": {"task_id": 299},
        "cerebral_bleed": {"task_id": 150, "crop": ["brain"]},
        "breasts": {"task_id": 527, "crop": ["body_trunc"]},
        "teeth": {"task_id": 113, "crop": ["mandible"], "crop_model": "craniofacial_structures"},
        "craniofacial_structures": {"task_id": 115, "crop": ["skull"]},
    }
    plain, every = TotalSegmentatorOptions(), TotalSegmentatorOptions(subset=False)
    assert _models(tasks, "total", plain) == [291, 292, 298]
    assert _models(tasks, "total", every) == [291, 292]
    assert _models(tasks, "total", TotalSegmentatorOptions(fast=True, robust=True)) == [297, 297]
    assert _models(tasks, "total", TotalSegmentatorOptions(fastest=True)) == [291, 292, 298]
    assert _models(tasks, "total_mr", plain) == [850, 852]
    assert _models(tasks, "body", plain) == [299]
    assert _models(tasks, "cerebral_bleed", plain) == [150, 298]
    assert _models(tasks, "breasts", plain) == [527, 300]
    assert _models(tasks, "teeth", plain) == [113, 115, 298]


# ------------------------------------------------------------------------------------------------------------- the package, by name


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "totalsegmentator", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*TotalSegmentator"):
        load_segmenter("totalsegmentator")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same modules and signatures on the path, in place of the real one."""
    root = tmp_path / "site" / "totalsegmentator"
    root.mkdir(parents=True)
    source = (
        textwrap.dedent(inspect.getsource(StandIn.totalsegmentator)).replace("self, input", "input").replace("assert self.silenced", "")
    )
    source = source.replace("self.runs.append", "runs.append").replace("self.fault", "None").replace("self.turned", "False")
    head = f"import numpy as np\nfrom typing import Any\nruns = []\nCLASSES = {CLASSES!r}\n"
    files = {
        "__init__": "",
        "python_api": head + source.replace("self.coarse", "False"),
        "map_to_binary": f"class_map = {CLASSES!r}\ncommercial_models = {{'tissue_types': 481}}\n",
        "config": f"""
            written = {{}}
            def setup_totalseg(): written.setdefault("send_usage_stats", True)
            def set_config_key(key, value): written[key] = value
            def get_weights_dir(): return {str(tmp_path / "weights")!r}
        """,
        "libs": "TASK_ID_WEIGHTS_CONFIGS = {291: {'foldername': 'Dataset291'}, 298: {'foldername': 'Dataset298', 'rel_path': 'rough'}}\n",
        "map_tasks_config": "TASK_CONFIGS = {'total': {'sub_modes': {'default': {'task_id': [291]}}}}\n",
    }
    for name, text in files.items():
        (root / f"{name}.py").write_text(textwrap.dedent(text))
    about = tmp_path / "site" / "TotalSegmentator-2.18.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: TotalSegmentator\nVersion: 2.18.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.partition(".")[0] == "totalsegmentator"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "weights"


def test_what_the_package_lacks_when_it_runs_is_said() -> None:
    segmenter = TotalSegmentator(api(StandIn(fault=ModuleNotFoundError("No module named 'dicom2nifti'"))))
    with pytest.raises(MissingExtraError, match=r"dicom2nifti.*pip install"):
        texts(segmenter, "liver")


def _forget_package() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "totalsegmentator"]:
        del sys.modules[name]


def test_the_package_is_loaded_by_name_and_silenced(package: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(_forget_package)
    with pytest.raises(WeightsError, match="Dataset291"):
        load_segmenter("totalsegmentator")
    for folder in ("Dataset291", "rough/Dataset298"):
        (package / folder).mkdir(parents=True)
    made = load_segmenter("totalsegmentator:total?fast=off")
    assert texts(made, "liver")[0].status == "ok"
    config: Callable[..., Any] = sys.modules["totalsegmentator.config"]  # type: ignore[assignment]
    assert config.written["send_usage_stats"] is False  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"option fast .* cannot be 'perhaps'"):
        load_segmenter("totalsegmentator:total?fast=perhaps")
    with pytest.raises(ModelError, match="licence"):
        load_segmenter("totalsegmentator:tissue_types")

"""Every backend by name through seerseg_predict on phantoms stored askew: masks lie on the input, what cannot be done is said."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_sams import sam2_model, sam_model, save

from seerseg.cli.predict import predict
from seerseg.errors import UsageError
from seerseg.model import open_model
from seerseg.prediction import Predictor
from seerseg.segmenters import load_segmenter
from seerseg.views import MEDVOL_R1_VIEWS, SEER_VIEWS, ViewSpec, agreed_views

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "run_all_backends.py"
SHAPE_XYZ = (22, 26, 9)


def blob(at: Sequence[int], radius: float) -> np.ndarray:
    """True within `radius` of a voxel (x, y, z)."""
    grids = np.meshgrid(*(np.arange(n) for n in SHAPE_XYZ), indexing="ij")
    return sum(((g - c) / (1 if i < 2 else 0.5)) ** 2 for i, (g, c) in enumerate(zip(grids, at, strict=True))) <= radius**2  # type: ignore[no-any-return]


def oblique() -> np.ndarray:
    """An affine of left, posterior, superior axes, anisotropic and turned by 12 degrees."""
    turn = np.deg2rad(12)
    axes = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]) @ np.diag([-3.0, -3.0, 6.0])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, (30, 40, -20)
    return affine


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_all_backends", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_all_backends"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two channels and labels (1: a bright ball) of one case, on an oblique LPS grid."""
    root = tmp_path_factory.mktemp("phantom")
    rng, ball = np.random.default_rng(0), blob((8, 11, 4), 4)
    for name, array in (
        ("a", np.where(ball, 400, 0) + rng.normal(0, 20, SHAPE_XYZ)),
        ("b", np.where(blob((15, 16, 4), 4), 400, 0) + rng.normal(0, 20, SHAPE_XYZ)),
        ("labels", ball),
    ):
        nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), oblique()), root / f"{name}.nii.gz")
    return root / "a.nii.gz", root / "b.nii.gz", root / "labels.nii.gz"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(predict, [*map(str, arguments), "-device", "cpu"])


def record(folder: Path, case: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / f"{case}.json").read_text())
    return value


# ------------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_all_backends_that_are_here_draw_on_the_scans_own_grid(
    script: ModuleType, phantom: tuple[Path, Path, Path], tmp_path: Path, modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TOTALSEG_HOME_DIR", "TOTALSEG_WEIGHTS_PATH"):
        monkeypatch.setenv(variable, str(tmp_path))
    scan = script.Scan("p", (phantom[0],), phantom[2], modality, ("liver", (1,)), ("liver",))
    seen = {}
    for backend in script.backends(tmp_path / "weights", scan):
        if backend.name.startswith(("nnunet", "total")):
            continue  # theirs come below: they take longer
        seen[backend.name] = script.run(tmp_path, scan, backend)
    assert set(seen) == {"nano", "grow", "scripted", "medsam2", "sam"}
    for name, row in seen.items():
        assert row["exit"] == 0, name
        assert row["exact"], name
    assert seen["scripted"]["dice"] == [1.0]
    assert seen["grow"]["dice"][0] > 0.8
    assert "ok" in seen["medsam2"]["requests"][0]


@pytest.mark.slow
def test_all_backends_on_the_real_chest_and_tumour(script: ModuleType, development_data: Path, tmp_path: Path) -> None:
    given = type("Given", (), {"out": tmp_path, "chest": None, "tumour": None})()
    rows = [script.run(tmp_path, scan, backend) for scan in script.scans(given) for backend in script.backends(tmp_path / "w", scan)]
    assert {row["scan"] for row in rows} >= {"tumour"}
    assert all(row["exit"] == 0 and row["exact"] for row in rows), "\n".join(map(script.line, rows))


# ----------------------------------------------------------------------------------------------------- several channels


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = pytest.importorskip("tiny_nnunet")
    folder: Path = tiny.folder(
        tmp_path_factory.mktemp("nn") / "m",
        {"background": 0, "liver": 1, "spleen": 2},
        channels=("T1", "FLAIR"),
        reader="NibabelIOWithReorient",
    )
    return folder


def case_folder(path: Path, *channels: Path) -> Path:
    path.mkdir()
    for number, channel in enumerate(channels):
        (path / f"c_{number:04d}.nii.gz").write_bytes(channel.read_bytes())
    return path


def test_an_nnunet_of_two_channels_sees_both(two_channels: Path, phantom: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The second channel changes the mask; the command line and Python agree; the grid is the input's."""
    first, second, _ = phantom
    masks = []
    for name, channels in (("ab", (first, second)), ("aa", (first, first))):
        out = tmp_path / f"out_{name}"
        cases = case_folder(tmp_path / name, *channels)
        done = run("-i", cases, "-o", out, "--segmenter", f"nnunet:{two_channels}", "--prompt", "liver", "--modality", "MR")
        assert done.exit_code == 0, done.output
        made = nibabel.load(out / "c.nii.gz")
        assert (made.affine == nibabel.load(first).affine).all()
        masks.append(np.asarray(made.dataobj) > 0)
    assert masks[0].any()
    assert (masks[0] != masks[1]).any()
    found = Predictor(f"nnunet:{two_channels}", device="cpu").predict([first, second], "liver", modality="MR")
    assert found.array is not None
    assert (found.array == masks[0]).all()


def test_an_nnunet_of_two_channels_given_one_says_so(two_channels: Path, phantom: tuple[Path, Path, Path], tmp_path: Path) -> None:
    cases = case_folder(tmp_path / "one", phantom[0])
    out = tmp_path / "out"
    done = run("-i", cases, "-o", out, "--segmenter", f"nnunet:{two_channels}", "--prompt", "liver", "--modality", "MR")
    assert done.exit_code == 3, done.output
    request = record(out, "c")["requests"][0]
    assert request["status"] == "unsupported"
    assert "2 channels (T1, FLAIR)" in request["message"]


# ------------------------------------------------------------------------------------------------- options after the source


@pytest.fixture(scope="module")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(sam2_model(), tmp_path_factory.mktemp("sam2") / "tiny")


def test_options_of_medsam2_shape_what_is_drawn(sam2: Path, phantom: tuple[Path, Path, Path], tmp_path: Path, script: ModuleType) -> None:
    scan = script.Scan("p", (phantom[0],), phantom[2], "CT", ("liver", (1,)), ("liver",))
    replies = tmp_path / "replies.json"
    replies.write_text(json.dumps([script.true_reply(scan)]))
    drawn = {}
    for options in ("", "?slices=3,6", "?window=200,400&stop_after=never&joined=on&memo_mb=1"):
        out = tmp_path / str(len(drawn))
        arguments = ("--segmenter", f"medsam2:{sam2}{options}", "--protocol", "medvol-r1", "--reasoner", f"scripted:{replies}")
        done = run("-i", phantom[0], "-o", out, "--modality", "CT", "--prompt", "liver", *arguments)
        assert done.exit_code == 0, done.output
        drawn[options] = np.asarray(nibabel.load(out / "a.nii.gz").dataobj).any(axis=(0, 1))
    assert drawn[""].sum() > 3
    assert set(np.flatnonzero(drawn["?slices=3,6"])) <= {3, 4, 5}
    identities = {load_segmenter(f"medsam2:{sam2}{options}").card.identity for options in drawn}
    assert len(identities) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("?slices=6,3", "one past the last"),
        ("?slices=4", "one past the last"),
        ("?window=40", "centre and width"),
        ("?window=40,-3", "above 0"),
        ("?stop_after=0", "or never"),
        ("?joined=perhaps", "on or off"),
        ("?memo_mb=much", "megabytes"),
        ("?windw=40,400", "no option 'windw=40,400'. Did you mean"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_opened(options: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_segmenter(f"medsam2:/no/such/folder{options}")


def test_options_of_sam(tmp_path: Path) -> None:
    folder = save(sam_model(), tmp_path / "tiny")
    assert "Fed as sam is." in load_segmenter(f"sam:{folder}").card.notes
    assert "Fed as medsam is." in load_segmenter(f"sam:{folder}?recipe=medsam&window=40,400").card.notes
    with pytest.raises(UsageError, match="sam or medsam"):
        load_segmenter(f"sam:{folder}?recipe=ham")


# ------------------------------------------------------------------------------------------- second reading, agreed views


def combined(x: int, name: str) -> str:
    answer = {"target": name, "side": "none", "slice": 4, "boxes": [[x, 250, x + 350, 650]]}
    return f"<evidence>seen</evidence><rationale>named</rationale><answer>{json.dumps(answer)}</answer>"


def test_a_second_reading_from_the_command_line(phantom: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The first reply boxes a place without the mask; asked once more, the reasoner boxes the ball."""
    labels = {"kind": "scripted_segmenter", "names": {"liver": 1}, "cases": {"*": str(phantom[2])}}
    (tmp_path / "s.json").write_text(json.dumps(labels))
    scores = {}
    for flags in ((), ("--second_reading",)):
        (tmp_path / "r.json").write_text(json.dumps([combined(640, "liver"), combined(180, "liver")]))
        out = tmp_path / f"out{len(flags)}"
        parts = ("--segmenter", f"scripted:{tmp_path / 's.json'}", "--reasoner", f"scripted:{tmp_path / 'r.json'}", "--protocol", "seerseg")
        done = run("-i", phantom[0], "-o", out, "--modality", "CT", "--prompt", "liver", *parts, *flags)
        assert done.exit_code == 0, done.output
        scores[flags] = record(out, "a")["requests"][0]["agreement"]
    assert not scores[()]["agrees"]
    assert scores[("--second_reading",)]["score"] > scores[()]["score"]


def test_a_second_reading_where_the_named_side_is_not_the_anchors(phantom: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The ball lies in the right half; a reply that calls it left is asked for again, although its box fits."""
    labels = {"kind": "scripted_segmenter", "names": {"left lung": 1, "right lung": 1}, "cases": {"*": str(phantom[2])}}
    (tmp_path / "s.json").write_text(json.dumps(labels))
    (tmp_path / "r.json").write_text(json.dumps([combined(180, "left lung"), combined(180, "right lung")]))
    parts = ("--segmenter", f"scripted:{tmp_path / 's.json'}", "--reasoner", f"scripted:{tmp_path / 'r.json'}", "--protocol", "seerseg")
    answered = []
    for flags in ((), ("--second_reading",)):
        out = tmp_path / f"out{len(flags)}"
        done = run("-i", phantom[0], "-o", out, "--modality", "CT", "--prompt", "the lung with the ball", *parts, *flags)
        assert done.exit_code == 0, done.output
        answered.append(record(out, "a")["requests"][0])
    assert answered[0]["agreement"]["agrees"]
    assert "lies in the right half" in answered[0]["message"]
    assert [one["target_answered"] for one in answered] == ["left lung", "right lung"]


def test_the_views_of_another_protocol_take_the_place_of_the_manifests(tmp_path: Path) -> None:
    """As training agrees them: the published number and size of slices, the planned plane and window."""
    planned = ViewSpec(plane="coronal", count=12, window=(40.0, 400.0))
    manifest = {"schema": 1, "protocol": "seer", "reasoner": "lexicon", "segmenter": "grow", "views": planned.to_json()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert open_model(tmp_path).view_spec == planned
    assert open_model(tmp_path, protocol="seer").view_spec == planned
    shown = open_model(tmp_path, protocol="medvol-r1").view_spec
    assert (shown.count, shown.size_px, shown.plane, shown.window) == (64, 256, "coronal", (40.0, 400.0))
    assert open_model(protocol="medvol-r1").view_spec == MEDVOL_R1_VIEWS
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "protocol": "medvol-r1", "views": shown.to_json()}))
    back = open_model(tmp_path, protocol="seer").view_spec
    assert (back.count, back.size_px, back.plane, back.window) == (SEER_VIEWS.count, SEER_VIEWS.size_px, "coronal", (40.0, 400.0))
    assert agreed_views(planned, SEER_VIEWS) == planned

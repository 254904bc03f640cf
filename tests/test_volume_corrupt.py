"""Whatever bytes a file holds: an image, or one sentence. Never another exception, never a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from seerseg.errors import SeerSegError
from seerseg.volume import read_grid, read_labels, read_legend, read_segmentation_names, read_volume, write_labels

NAMES = ["a.nii", "a.nii.gz", "n2.nii", "a.nrrd", "z.nrrd", "a.seg.nrrd", "a.mha", "z.mha", "a.png", "a.jpg", "a.tif", "a.bmp", "a.dcm"]
HEADER_BYTES = 700


class Files(dict[str, bytes]):
    """Sound files by name; shown short when a test fails."""

    def __repr__(self) -> str:
        return f"Files({', '.join(self)})"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A sound file of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    voxels = np.random.default_rng(0).integers(0, 99, (6, 7, 8)).astype(np.int16)
    for name in ("a.nii", "a.nii.gz"):
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 2, 3, 1])), folder / name)
    nib.save(nib.Nifti2Image(voxels, np.diag([1.0, 2, 3, 1])), folder / "n2.nii")
    volume = read_volume(folder / "a.nii")
    assert volume.source is not None
    write_labels(volume.array > 5, volume.grid, volume.source, folder / "n2.nii", legend={1: "liver"})
    image = sitk.GetImageFromArray(voxels)
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(folder / name))
        sitk.WriteImage(image, str(folder / name.replace("a.", "z.", 1)), True)
    image.SetMetaData("Segment0_Name", "liver")
    image.SetMetaData("Segment0_LabelValue", "4")
    sitk.WriteImage(image, str(folder / "a.seg.nrrd"))
    for name in ("a.png", "a.jpg", "a.tif", "a.bmp"):
        Image.fromarray(voxels[0].astype(np.uint8)).save(folder / name)
    sitk.WriteImage(image[:, :, 0], str(folder / "a.dcm"))
    return Files({name: (folder / name).read_bytes() for name in NAMES})


def read_all(path: Path) -> None:
    """Everything that reads a file; only a SeerSegError that names it may come out."""
    for read in (read_grid, read_volume, read_labels, read_segmentation_names, read_legend):
        reader: Callable[[Path], object] = read
        sentence = path.name
        try:
            reader(path)
        except SeerSegError as error:
            sentence = str(error)
        assert path.name in sentence
        assert "\n" not in sentence
        assert len(sentence) < 600


@pytest.mark.parametrize("name", NAMES)
def test_sound_files_are_read(tmp_path: Path, whole: Files, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(whole[name])
    assert read_volume(path).grid.size > 1


@settings(max_examples=25)
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_truncated_files(tmp_path: Path, whole: Files, name: str, data: st.DataObject) -> None:
    path = tmp_path / name
    path.write_bytes(whole[name][: data.draw(st.integers(0, len(whole[name]) - 1))])
    read_all(path)


@settings(max_examples=40)
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_files_with_wrong_bytes(tmp_path: Path, whole: Files, name: str, data: st.DataObject) -> None:
    path = tmp_path / name
    raw = bytearray(whole[name])
    places = st.integers(0, min(len(raw), HEADER_BYTES) - 1)
    for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=12)):
        raw[at] = value
    path.write_bytes(raw)
    read_all(path)


@settings(max_examples=25)
@pytest.mark.parametrize("name", NAMES)
@given(noise=st.binary(max_size=600), data=st.data())
def test_random_bytes(tmp_path: Path, whole: Files, name: str, noise: bytes, data: st.DataObject) -> None:
    path = tmp_path / name
    path.write_bytes(whole[name][: data.draw(st.sampled_from([0, 4, 20, 348]))] + noise)
    read_all(path)

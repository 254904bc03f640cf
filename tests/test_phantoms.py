"""Phantoms: the same seed gives the same scan, sides lie where they should, and the label table is stable."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
import scipy
from scipy import ndimage

from seerseg.vocabulary import Vocabulary
from seerseg.volume import Grid
from seerseg_data.phantoms import ALL_LABELS, KINDS, Phantom, phantom


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_types_and_names(kind: str) -> None:
    drawn = phantom(kind, 3, spacing_zyx_mm=(8.0, 8.0, 8.0))
    assert drawn.array_zyx.dtype == np.int16
    assert drawn.labels_zyx.dtype == np.uint8
    assert drawn.array_zyx.shape == drawn.labels_zyx.shape
    assert set(drawn.names) == set(np.unique(drawn.labels_zyx)) - {0}
    assert all(ALL_LABELS[name] == value for value, name in drawn.names.items())
    assert drawn.array_zyx.min() >= (0 if kind == "head_mr" else -1024)


def test_same_seed_same_scan_other_seed_other_scan() -> None:
    one, two, three = (phantom("chest", seed, spacing_zyx_mm=(9.0, 8.0, 8.0)) for seed in (5, 5, 6))
    assert np.array_equal(one.array_zyx, two.array_zyx)
    assert np.array_equal(one.labels_zyx, two.labels_zyx)
    assert not np.array_equal(one.array_zyx, three.array_zyx)


def test_sides_by_world_position() -> None:
    drawn = phantom("torso", 1, spacing_zyx_mm=(8.0, 6.0, 6.0))

    def middle_x(name: str) -> float:
        index = np.argwhere(drawn.mask(name))[:, ::-1].mean(0)
        return float((drawn.affine @ np.append(index, 1.0))[0])

    assert middle_x("right lung") > 0 > middle_x("left lung")  # +x is the patient's right
    assert middle_x("right kidney") > 0 > middle_x("left kidney")
    assert middle_x("liver") > 0 > middle_x("spleen")
    assert middle_x("heart") < 0
    assert np.argwhere(drawn.mask("right kidney"))[:, 0].mean() < np.argwhere(drawn.mask("left kidney"))[:, 0].mean()


def test_lungs_are_air_and_bone_is_bright() -> None:
    drawn = phantom("chest", 2, spacing_zyx_mm=(6.0, 5.0, 5.0))
    assert drawn.array_zyx[drawn.mask("left lung", "right lung")].mean() < -550
    assert drawn.array_zyx[drawn.mask("thoracic vertebral column")].mean() > 120


def test_shape_cuts_the_field() -> None:
    drawn = phantom("abdomen", 0, spacing_zyx_mm=(10.0, 5.0, 5.0), shape_zyx=(12, 40, 48))
    assert drawn.array_zyx.shape == (12, 40, 48)
    assert np.allclose(np.diag(drawn.affine)[:3], (5.0, 5.0, 10.0))


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="leg"):
        phantom("leg")
    with pytest.raises(ValueError, match="positive"):
        phantom("chest", spacing_zyx_mm=(0.0, 1.0, 1.0))
    with pytest.raises(KeyError):
        phantom("head", spacing_zyx_mm=(12.0, 12.0, 12.0)).mask("tail")


DRAWN_WITH = ("2.4", "1.17")
AS_FIRST_DRAWN = {
    "chest-0": ("b52ddf13c555bae6", 9368, -498.137),
    "abdomen-0": ("5d5f9a343ac5ad67", 17757, -253.205),
    "pelvis-0": ("886c85e65d11ee1a", 4760, -536.424),
    "torso-0": ("04cf8743dfd2cf2b", 19630, -429.599),
    "head-0": ("147f411c7227661e", 3740, -536.353),
    "torso-7": ("ece2859275e107b5", 45864, -348.42),
    "head-7": ("2bb96cd7a7e5c9d8", 5550, -536.789),
    "abdomen-cut": ("371f9d373730744b", 8767, -146.873),
}
"""kind-seed -> digest of everything, labelled voxels, mean intensity: the nano segmenter was trained on these very arrays."""
FIRST_SPACINGS = {"0": (8.0, 8.0, 8.0), "7": (9.0, 6.0, 6.0)}


@pytest.mark.parametrize("name", AS_FIRST_DRAWN)
def test_the_first_kinds_stay_as_they_were(name: str) -> None:
    kind, seed = name.split("-")
    if seed == "cut":
        drawn = phantom(kind, 3, spacing_zyx_mm=(10.0, 5.0, 5.0), shape_zyx=(12, 40, 48))
    else:
        drawn = phantom(kind, int(seed), spacing_zyx_mm=FIRST_SPACINGS[seed])
    digest, voxels, mean = AS_FIRST_DRAWN[name]
    assert np.count_nonzero(drawn.labels_zyx) == pytest.approx(voxels, rel=1e-3)
    assert drawn.array_zyx.mean() == pytest.approx(mean, abs=0.5)
    if (np.__version__.rpartition(".")[0], scipy.__version__.rpartition(".")[0]) == DRAWN_WITH:
        everything = drawn.array_zyx.tobytes() + drawn.labels_zyx.tobytes() + drawn.affine.tobytes() + repr(drawn.names).encode()
        assert hashlib.blake2b(everything, digest_size=8).hexdigest() == digest


def centre(drawn: Phantom, name: str) -> np.ndarray:
    return Grid(drawn.array_zyx.shape, drawn.affine).to_world(np.argwhere(drawn.mask(name)).mean(axis=0))


@pytest.mark.parametrize("kind", ["head_mr", "torso_lesions"])
def test_new_kinds_have_twelve_structures_on_both_sides(kind: str) -> None:
    lesions: set[str] = set()
    for seed in range(5):
        drawn = phantom(kind, seed, spacing_zyx_mm=(7.0, 6.0, 6.0) if kind == "torso_lesions" else (5.0, 4.0, 4.0), tilt_degrees=7.0)
        assert len(drawn.names) >= 12
        sided = [n for n in drawn.names.values() if n.startswith("right ") and n.replace("right", "left") in drawn.names.values()]
        assert len(sided) >= 5
        for name in sided:
            if "nodule" not in name and "cyst" not in name:
                assert centre(drawn, name)[0] > centre(drawn, name.replace("right", "left"))[0], name  # +x is the patient's right
        lesions |= {n for n in drawn.names.values() if any(word in n for word in ("tumour", "nodule", "metastasis", "oedema", "cyst"))}
    wanted = {"enhancing tumour", "non-enhancing tumour core", "peritumoural oedema", "brain metastasis"}
    assert lesions >= (wanted if kind == "head_mr" else {"liver tumour", "right lung nodule", "left lung nodule"})


def test_every_name_is_in_the_vocabulary() -> None:
    vocabulary = Vocabulary.load()
    bare = {name: name.removeprefix("left ").removeprefix("right ") for name in ALL_LABELS}  # nodules have no sides there
    assert [name for name in ALL_LABELS if vocabulary.resolve(name) is None and vocabulary.resolve(bare[name]) is None] == []


def test_lesions_lie_in_their_organs_and_look_it() -> None:
    found = 0
    for seed in range(4):
        drawn = phantom("torso_lesions", seed, spacing_zyx_mm=(5.0, 4.0, 4.0))
        for lesion, organ in (("liver tumour", "liver"), ("right lung nodule", "right lung"), ("left kidney cyst", "left kidney")):
            mask = drawn.mask(lesion)
            if not mask.any():
                continue
            found += 1
            shell = ndimage.binary_dilation(mask) & ~mask
            assert np.count_nonzero(shell & drawn.mask(organ)) > 0.5 * np.count_nonzero(shell)
            inside, around = (float(np.median(drawn.array_zyx[m])) for m in (mask, drawn.mask(organ)))
            assert inside > around + 300 if organ == "right lung" else inside < around
    assert found >= 5


def test_head_mr_looks_like_t1_after_contrast() -> None:
    seed = next(s for s in range(9) if "enhancing tumour" in phantom("head_mr", s, spacing_zyx_mm=(6.0, 5.0, 5.0)).names.values())
    drawn = phantom("head_mr", seed, spacing_zyx_mm=(3.0, 3.0, 3.0))  # the same head, seen finer
    value = {n: float(np.median(drawn.array_zyx[drawn.mask(n)])) for n in drawn.names.values()}
    assert value["enhancing tumour"] > value["corpus callosum"] > value["right putamen"] > value["right lateral ventricle"]
    assert value["non-enhancing tumour core"] < value["peritumoural oedema"] < value["left cerebral hemisphere"]


def test_a_tilted_grid_shows_the_same_body() -> None:
    straight, tilted = (phantom("head_mr", 3, spacing_zyx_mm=(4.0, 3.0, 2.5), tilt_degrees=t) for t in (0.0, 15.0))
    axes = tilted.affine[:3, :3] / np.array([2.5, 3.0, 4.0])
    assert np.allclose(axes.T @ axes, np.eye(3))
    assert np.isclose(np.rad2deg(np.arccos((np.trace(axes) - 1) / 2)), 15.0)
    assert np.linalg.det(axes) > 0
    for name in ("right eyeball", "left eyeball", "right thalamus", "left putamen"):
        assert np.linalg.norm(centre(straight, name) - centre(tilted, name)) < 4.0  # the bending is the grid's own
    again = phantom("head_mr", 3, spacing_zyx_mm=(4.0, 3.0, 2.5), tilt_degrees=15.0)
    assert np.array_equal(tilted.array_zyx, again.array_zyx)


def test_new_kinds_are_fast_enough_for_tests() -> None:
    for kind, limit_s in (("head_mr", 1.0), ("torso_lesions", 3.0)):
        began = time.process_time()
        phantom(kind, 0, spacing_zyx_mm=(3.0, 3.0, 3.0))
        assert time.process_time() - began < limit_s

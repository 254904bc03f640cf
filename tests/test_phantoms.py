"""Phantoms: the same seed gives the same scan, sides lie where they should, and the label table is stable."""

from __future__ import annotations

import numpy as np
import pytest

from seerseg_data.phantoms import KINDS, LABELS, phantom


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_types_and_names(kind: str) -> None:
    drawn = phantom(kind, 3, spacing_zyx_mm=(8.0, 8.0, 8.0))
    assert drawn.array_zyx.dtype == np.int16
    assert drawn.labels_zyx.dtype == np.uint8
    assert drawn.array_zyx.shape == drawn.labels_zyx.shape
    assert set(drawn.names) == set(np.unique(drawn.labels_zyx)) - {0}
    assert all(LABELS[name] == value for value, name in drawn.names.items())
    assert drawn.array_zyx.min() >= -1024


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

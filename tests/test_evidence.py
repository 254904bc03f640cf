"""Sentences about a scan are held against the voxels, by a reader of sentences that knows nothing of how they were made."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_cdt

from seerseg.errors import DatasetError
from seerseg.views import ViewSpec, slice_indices
from seerseg.volume import Grid, Volume, read_labels, read_volume
from seerseg_data.evidence import (
    BOTH_SIDES,
    HOUNSFIELD,
    ONE_SIDE,
    SHORT_TOKENS,
    TAIL,
    TOUCHING_FACES,
    Evidence,
    Scene,
    hounsfield_word,
    measure,
    numbers,
    scene_sentences,
    sentences,
    survey,
    tokens,
)

SPEC = ViewSpec(count=8, size_px=64, window="volume")
BOX = st.tuples(*[st.tuples(st.integers(2, 15), st.integers(1, 9)) for _ in range(3)])
FACES = {"bottom": (0, 0), "top": (0, -1), "back": (1, 0), "front": (1, -1), "left": (2, 0), "right": (2, -1)}
WAYS = {
    "to the left of": (0, -1),
    "to the right of": (0, 1),
    "behind": (1, -1),
    "in front of": (1, 1),
    "below": (2, -1),
    "above": (2, 1),
}
THIRDS = {"lower": (2, 0), "upper": (2, 2), "back": (1, 0), "front": (1, 2), "left": (0, 0), "right": (0, 2)}


# ------------------------------------------------------------------------------------------------------ the reader of sentences


class Truth:
    """Says of every sentence whether it is true of the label `values` in the arrays; KeyError for a sentence it cannot read."""

    def __init__(
        self, volume: Volume, labels: np.ndarray, names: dict[str, tuple[int, ...]], name: str, spec: ViewSpec, midline: float | None
    ):
        self.volume, self.labels, self.names, self.spec, self.midline = volume, labels, names, spec, midline
        self.mask = np.isin(labels, names[name])
        self.axis = spec.axis
        self.shown = slice_indices(spec.count, labels.shape[self.axis], spec.lo, spec.hi)
        self.known: dict[str, bool] = {}
        self.on = [bool(np.moveaxis(self.mask, self.axis, 0)[i].any()) for i in self.shown]

    def world(self, mask: np.ndarray) -> np.ndarray:
        z, y, x = np.nonzero(mask)
        return np.stack([z, y, x, np.ones(len(z))])[[2, 1, 0, 3]].T @ self.volume.grid.affine.T[:, :3]

    def body(self) -> np.ndarray:
        return self.world(self.volume.array > (-300 if self.volume.modality == "CT" else 0.12 * np.percentile(self.volume.array, 99.5)))

    def numbered(self, said: str) -> bool:
        wanted = set()
        for piece in said.split(", "):
            first, _, last = piece.replace(" to ", "-").partition("-")
            wanted.update(range(int(first), int(last or first) + 1))
        return wanted == {n for n, on in enumerate(self.on, 1) if on}

    def side(self, said: str) -> bool:
        assert self.midline is not None, "nothing may be said of side without a midline"
        x = self.world(self.mask)[:, 0]
        right = float(np.mean(x > self.midline))
        most = {"left": 1 - right >= ONE_SIDE, "right": right >= ONE_SIDE}
        most |= {"mostly left": right <= BOTH_SIDES, "mostly right": right >= 1 - BOTH_SIDES - 1e-9}
        return most.get(said, min(right, 1 - right) >= BOTH_SIDES)

    def third(self, word: str, world: int) -> bool:
        body, centre = self.body()[:, world], self.world(self.mask)[:, world].mean()
        half = self.volume.grid.spacing_zyx[2 - world] / 2
        low, high = body.min() - half, body.max() + half
        number = {"middle": 1}.get(word, THIRDS.get(word, (world, 1))[1])
        assert word == "middle" or THIRDS[word][0] == world
        return low + (high - low) * number / 3 - 1e-6 <= centre <= low + (high - low) * (number + 1) / 3 + 1e-6

    def where(self, way: str, other: str) -> bool:
        world, sign = WAYS[way]
        mine, theirs = self.world(self.mask)[:, world] * sign, self.world(np.isin(self.labels, self.names[other]))[:, world] * sign
        return np.percentile(mine, TAIL) >= np.percentile(theirs, 100 - TAIL) - 1e-6 and mine.mean() > theirs.mean()

    def touches(self, other: str) -> bool:
        theirs, faces = np.isin(self.labels, self.names[other]), 0
        for axis in range(3):
            a, b = np.moveaxis(self.mask, axis, 0), np.moveaxis(theirs, axis, 0)
            faces += int((a[1:] & b[:-1]).sum() + (a[:-1] & b[1:]).sum())
        return faces >= TOUCHING_FACES

    def brightness(self, said: str) -> bool:
        low, high = np.percentile(self.volume.array, (0.5, 99.5))
        spacing = [s for a, s in enumerate(self.volume.grid.spacing_zyx) if a != self.axis]
        reach = min(8, max(2, round(5 / min(spacing)) + 1))
        inside, around = [], []
        for index in self.shown:
            plane = np.moveaxis(self.mask, self.axis, 0)[index]
            grey = np.clip((np.moveaxis(self.volume.array, self.axis, 0)[index] - low) / max(high - low, 1e-6), 0, 1)
            inside += grey[plane].tolist()
            if plane.any():
                near = distance_transform_cdt(~plane, "taxicab") <= reach
                around += grey[near & (distance_transform_cdt(~plane, "chessboard") > 1)].tolist()
        gap = float(np.median(inside) - np.median(around))
        return {"brighter than": gap > 0.07, "darker than": gap < -0.07}.get(said, abs(gap) < 0.09)

    def holds(self, sentence: str) -> bool:
        return self.of(FULL, sentence)

    def of(self, patterns: dict, said: str) -> bool:
        for pattern, check in patterns.items():
            if said not in self.known and (found := re.fullmatch(pattern, said)) is not None:
                self.known[said] = bool(check(self, *found.groups()))
        return self.known[said]


def _covers(t: Truth, with_it: str, of: str, plane: str, share: str) -> bool:
    on = int(np.moveaxis(t.mask, t.axis, 0).any(axis=(1, 2)).sum())
    return int(with_it) == on and int(of) == t.mask.shape[t.axis] and plane == t.spec.plane and abs(100 * on / int(of) - int(share)) <= 0.5


def _largest(t: Truth, number: str | None) -> bool:
    if number is None:
        return sum(t.on) == 1
    areas = [int(np.moveaxis(t.mask, t.axis, 0)[i].sum()) for i in t.shown]
    return areas[int(number) - 1] == max(areas)


def _pieces(t: Truth) -> tuple[int, float]:
    from skimage.measure import label

    found = label(t.mask, connectivity=3)
    return int(found.max()), float(np.bincount(found.ravel())[1:].max() / t.mask.sum())


def _size(t: Truth, *said: str) -> bool:
    for axis in range(3):
        line = np.flatnonzero(t.mask.any(axis=tuple(a for a in range(3) if a != axis)))
        if abs((line[-1] - line[0] + 1) * t.volume.grid.spacing_zyx[axis] - float(said[axis])) > 0.5 + 1e-6:
            return False
    ml = t.mask.sum() * t.volume.grid.voxel_volume_mm3 / 1000
    return abs(ml - float(said[3])) <= (0.05 if ml >= 1 else 0.005) + 1e-9


def _edges(t: Truth, said: str) -> bool:
    words = re.split(r", | and ", said)
    return all(np.moveaxis(t.mask, FACES[w][0], 0)[FACES[w][1]].any() for w in words)


def _thirds(t: Truth, said: str) -> bool:
    ways = {"in height": 2, "in depth": 1, "in width": 0}
    return all(
        t.third(*re.fullmatch(r"(\w+) third (.+)", p).group(1, 2)[:1], ways[p.split(" third ")[1]]) for p in re.split(r", | and ", said)
    )


COVER = r"in the whole scan it covers (\d+) of the (\d+) (\w+) slices \((\d+) %\)\."
AROUND = r"(?:its surroundings|what surrounds it|around)"
FULL = {
    r"(\d+) (\w+) slices? of an? .+ (?:are|is) shown\.": lambda t, n, plane: int(n) == len(t.shown) and plane == t.spec.plane,
    rf"The structure is on slices? ([\d, to]+)(?:, largest on slice (\d+))?; {COVER}": lambda t, said, most, *rest: (
        t.numbered(said) and _largest(t, most) and _covers(t, *rest)
    ),
    rf"The structure is on none of them; {COVER}": lambda t, *rest: not any(t.on) and _covers(t, *rest),
    r"It lies ((?:mostly )?(?:left|right)) of the midline(?:, on the (left|right) of the picture)?\.": lambda t, side, seen: (
        t.side(side) and (seen is None or seen not in side) and (seen is None) == (t.spec.plane == "sagittal")
    ),
    r"It lies (on both sides of|in) the midline\.": lambda t, said: t.side("both"),
    r"Its centre is in the (.+) of what is imaged of the body\.": _thirds,
    r"It touches the (.+)\.": lambda t, other: t.touches(other),
    rf"It lies ({'|'.join(WAYS)}) the (.+?)( and touches it|, which it touches)?\.": lambda t, way, other, also: (
        t.where(way, other) and (not also or t.touches(other))
    ),
    r"It reaches the (.+) edges? of the scan\.": _edges,
    rf"It is (as bright as|brighter than|darker than) {AROUND}\.": lambda t, said: t.brightness(said),
    r"Its median is (-?\d+) HU, in the range of (.+)\.": lambda t, hu, word: (
        abs(np.median(t.volume.array[t.mask]) - int(hu)) <= 0.5 and hounsfield_word(float(np.median(t.volume.array[t.mask]))) == word
    ),
    r"It measures (\d+) mm in height, (\d+) mm in depth and (\d+) mm in width, ([\d.]+) mL\.": _size,
    r"It is one connected piece\.": lambda t: _pieces(t)[0] == 1,
    r"It consists of (\d+) separate pieces(, nearly all of it in one)?\.": lambda t, n, nearly: (
        _pieces(t)[0] == int(n) and (_pieces(t)[1] >= 0.95) == bool(nearly)
    ),
}
SHORT = {
    r"slices? ([\d, -]+) of (\d+)": lambda t, said, of: t.numbered(said) and int(of) == len(t.shown),
    r"on none of the (\d+) slices": lambda t, of: not any(t.on) and int(of) == len(t.shown),
    rf"(as bright as|brighter than|darker than) {AROUND}": lambda t, said: t.brightness(said),
    r"((?:mostly )?(?:left|right)) of midline": lambda t, side: t.side(side),
    r"on both sides|in the midline": lambda t: t.side("both"),
    rf"({'|'.join(WAYS)}) the (.+)": lambda t, way, other: t.where(way, other),
    r"touches the (.+)": lambda t, other: t.touches(other),
    rf"((?:{'|'.join(THIRDS)})(?: (?:{'|'.join(THIRDS)}))*)(?: third)?": lambda t, said: all(
        t.third(w, THIRDS[w][0]) for w in said.split()
    ),
    r"(\d+) pieces": lambda t, n: _pieces(t)[0] == int(n),
    r"reaches the (\w+) edge": lambda t, word: _edges(t, word),
}


def said_short(text: str) -> list[str]:
    """The statements of a short trace, without the scan's name."""
    head, _, rest = text.partition(". ")
    first = re.match(r"slices? [\d, -]+ of \d+|[^,]+", rest)
    assert head
    assert first is not None, text
    return [first.group(), *[p for p in rest[first.end() :].split(", ") if p]]


def said_full(text: str) -> list[str]:
    return re.findall(r"[A-Z\d][^.]*(?:\.\d+[^.]*)*\.(?= |$)", text)


def all_true(truth: Truth, evidence: Evidence, seeds: int = 3) -> set[str]:
    """Every sentence of several wordings is true; the patterns that were met."""
    met = set()
    for seed in range(seeds):
        text = sentences(evidence, random.Random(seed), "full")
        assert " ".join(said_full(text)) == text
        for sentence in said_full(text):
            assert truth.holds(sentence), (sentence, evidence)
            met.add(next(p for p in FULL if re.fullmatch(p, sentence)))
        short = sentences(evidence, random.Random(seed), "short")
        assert tokens(short) <= SHORT_TOKENS
        for statement in said_short(short):
            pattern = next((p for p in SHORT if re.fullmatch(p, statement)), None)
            assert pattern is not None, (statement, short)
            assert truth.of(SHORT, statement), (statement, evidence)
            met.add(pattern)
    return met


# ----------------------------------------------------------------------------------------------------------------- scenes


def boxed(
    *boxes: tuple[tuple[int, int], ...], greys: tuple[int, ...] = (300, 20), air: int = 3, shape=(24, 22, 26), spacing=(4.0, 5.0, 6.0)
):
    """A body of grey 100 with boxes of other greys in it, air at both sides when `air`; labels 1, 2, ... later boxes over earlier ones."""
    array, labels = np.full(shape, 100, np.int16), np.zeros(shape, np.uint8)
    if air:
        array[:, :, :air] = array[:, :, -air:] = 0
    for number, (box, grey) in enumerate(zip(boxes, greys, strict=True), 1):
        at = tuple(slice(min(first, n - 1), min(first + size, n)) for (first, size), n in zip(box, shape, strict=True))
        array[at], labels[at] = grey, number
    affine = np.diag([spacing[2], spacing[1], spacing[0], 1.0])
    affine[:3, 3] = (-70.0, 13.0, 7.0)
    return Volume(array, Grid(shape, affine), "MR"), labels


NAMES = {"left lung": (1,), "spleen": (2,)}


@settings(max_examples=12)
@given(BOX, BOX, st.sampled_from([300, 20, 100]), st.sampled_from(["axial", "coronal", "sagittal"]), st.sampled_from([0, 3]))
def test_every_sentence_is_true_of_random_boxes(first, second, grey, plane, air) -> None:
    volume, labels = boxed(first, second, greys=(grey, 160), air=air)
    spec = ViewSpec(plane=plane, count=6, size_px=64, window="volume")
    scene = survey(volume, labels, NAMES, spec=spec)
    middle = float(volume.grid.to_world([0, 0, 12.5])[0])
    assert (scene.midline_mm is None) == (air == 0)
    assert scene.midline_mm is None or abs(scene.midline_mm - middle) < 1e-6
    for name, values in NAMES.items():
        evidence = measure(scene, name, values)
        if evidence is None:
            assert not np.isin(labels, values).any()
            continue
        all_true(Truth(volume, labels, NAMES, name, spec, scene.midline_mm), evidence)


def test_every_kind_of_sentence_is_met_by_some_scene() -> None:
    met: set[str] = set()
    rng = np.random.default_rng(0)
    for number in range(40):
        boxes = [tuple((int(rng.integers(0, 20)), int(rng.integers(1, 9))) for _ in range(3)) for _ in range(2)]
        volume, labels = boxed(*boxes, greys=(int(rng.choice([20, 100, 300])), 160), air=3 * (number % 2))
        if number % 3 == 0:
            labels[2, 2, 2] = labels[2, 2, 20] = 1  # specks
        if number % 4 == 0:
            volume = Volume(volume.array * 4 - 400, volume.grid, "CT")
        for name, values in NAMES.items():
            spec = ViewSpec(count=3 if number % 5 else 8, size_px=64, window="volume")
            scene = survey(volume, labels, NAMES, spec=spec)
            if (evidence := measure(scene, name, values)) is not None:
                met |= all_true(Truth(volume, labels, NAMES, name, spec, scene.midline_mm), evidence, seeds=6)
    assert met == {*FULL, *SHORT}


@pytest.mark.parametrize(("kind", "seed"), [("torso", 0), ("head", 1)])
def test_every_sentence_is_true_of_phantoms(kind: str, seed: int) -> None:
    from seerseg_data.phantoms import phantom

    drawn = phantom(kind, seed, spacing_zyx_mm=(9.0, 7.0, 7.0))
    volume = Volume(drawn.array_zyx, Grid(drawn.array_zyx.shape, drawn.affine), "CT")
    names = {name: (value,) for value, name in drawn.names.items()}
    spec = ViewSpec(count=8, size_px=64, window="volume")
    scene = survey(volume, drawn.labels_zyx, names, spec=spec, regions=("chest",))
    assert scene.midline_mm is not None
    assert abs(scene.midline_mm) < 20  # phantoms are drawn about x = 0
    sides = {"liver": "right", "spleen": "left", "gallbladder": "right", "stomach": "left"}
    for name, values in names.items():
        evidence = measure(scene, name, values)
        assert evidence is not None
        all_true(Truth(volume, drawn.labels_zyx, names, name, spec, scene.midline_mm), evidence, seeds=1)
        if name.startswith(("left ", "right ")) or name in sides:
            assert evidence.side is not None
            assert evidence.side.endswith(sides.get(name, name.split()[0])), name
        if "vertebral column" in name or name in ("sternum", "spinal cord", "trachea"):
            assert evidence.side in (None, "both", "midline"), name


def test_all_orientations_give_the_same_sentences(tmp_path: Path) -> None:
    volume, labels = boxed(((4, 5), (3, 6), (14, 6)), ((9, 6), (3, 6), (13, 5)))
    image = nib.Nifti1Image(volume.array.transpose(2, 1, 0), volume.grid.affine)
    label = nib.Nifti1Image(labels.transpose(2, 1, 0), volume.grid.affine)
    said = set()
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            orientation = np.array([[a, f] for a, f in zip(axes, flips, strict=True)])
            nib.save(image.as_reoriented(orientation), tmp_path / "i.nii")
            nib.save(label.as_reoriented(orientation), tmp_path / "l.nii")
            read = read_volume(tmp_path / "i.nii", modality="MR")
            scene = survey(read, read_labels(tmp_path / "l.nii", read.grid)[0], NAMES, spec=SPEC)
            evidence = measure(scene, "left lung", (1,))
            assert evidence is not None
            said.add((sentences(evidence, random.Random(1), "full"), sentences(evidence, random.Random(1), "short")))
    assert len(said) == 1
    full, short = said.pop()
    assert "right of the midline" in full
    assert "below the spleen" in full
    assert "right of midline" in short


def test_sides_are_of_the_world_on_an_oblique_grid() -> None:
    volume, labels = boxed(((4, 5), (3, 6), (16, 4)), ((9, 6), (3, 6), (4, 4)))
    turn = np.eye(4)
    angle = np.deg2rad(20)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = Volume(volume.array, Grid(volume.grid.shape_zyx, turn @ volume.grid.affine), "MR")
    scene = survey(oblique, labels, NAMES, spec=SPEC)
    first, second = (measure(scene, name, values) for name, values in NAMES.items())
    assert first is not None
    assert second is not None
    assert (first.side, second.side) == ("right", "left")


def test_nothing_is_said_of_side_where_it_cannot_be_known() -> None:
    box = ((4, 5), (3, 6), (16, 4))
    volume, labels = boxed(box, greys=(300,))
    one = {"left lung": (1,)}
    for scene in (
        survey(*boxed(box, greys=(300,), air=0), one, spec=SPEC),  # the body leaves the field of view
        survey(volume, labels, one, spec=SPEC, sided=False),  # the file does not say which side is left
        survey(volume, labels, one, spec=SPEC, regions=("lower limb",)),  # the middle of a leg is no midline
        survey(*boxed(box, greys=(300,), spacing=(4.0, 5.0, 2.0)), one, spec=SPEC),  # too narrow for a body
        survey(Volume(volume.array, volume.grid, "US"), labels, one, spec=SPEC),
    ):
        evidence = measure(scene, "left lung", (1,))
        assert evidence is not None
        assert evidence.side is None
        assert evidence.thirds[2] is None
        for detail in ("short", "full"):
            assert "midline" not in sentences(evidence, random.Random(0), detail)


def test_a_picture_has_its_own_directions() -> None:
    array, labels = np.full((1, 40, 40), 90, np.uint8), np.zeros((1, 40, 40), np.uint8)
    labels[0, 30:36, 3:9], labels[0, 4:10, 3:9] = 1, 2
    volume = Volume(array, Grid((1, 40, 40), np.eye(4)))
    scene = survey(volume, labels, NAMES, spec=ViewSpec(plane="coronal"), sided=False, picture=True)
    evidence = measure(scene, "left lung", (1,))
    assert evidence is not None
    text = sentences(evidence, random.Random(0), "full")
    assert text.startswith("One image of a scan is shown. The structure is on it.")
    assert "upper third in height and right third in width of the picture" in text  # low x is on the right as displayed
    assert "above the spleen" in text
    assert "mL" not in text
    assert "midline" not in text
    assert sentences(evidence, random.Random(0)).startswith("scan. on the image, as bright as")


def test_hounsfield_words_have_no_gap() -> None:
    assert [hounsfield_word(v) for v in (-1000, -300, -100, 0, 50, 150, 900)] == [word for _, word in HOUNSFIELD]


@pytest.mark.parametrize(("found", "said"), [((3,), "3"), ((3, 4, 5), "3-5"), ((1, 3, 4, 8), "1, 3-4, 8")])
def test_numbers_are_said_as_ranges(found, said) -> None:
    assert numbers(found) == said


def test_a_scan_without_the_target_is_described_by_what_it_shows() -> None:
    volume, labels = boxed(((4, 5), (3, 6), (14, 6)), ((9, 6), (3, 6), (13, 5)))
    scene = survey(volume, labels, {**NAMES, "liver": (7,)}, spec=SPEC, regions=("chest",))
    assert (
        scene_sentences(scene, random.Random(0), "full")
        == "8 axial slices of an MR of the chest are shown. The scan shows left lung, spleen."
    )
    short = scene_sentences(scene, random.Random(0))
    assert "left lung, spleen" in short
    assert "liver" not in short
    assert tokens(short) <= SHORT_TOKENS
    many = {f"structure of a long name {i}": (i,) for i in range(1, 30)}
    labels = np.arange(labels.size, dtype=np.uint8).reshape(labels.shape) % 30
    crowded = survey(volume, labels, many, spec=SPEC)
    assert tokens(scene_sentences(crowded, random.Random(0))) <= SHORT_TOKENS
    assert "and 17 more" in scene_sentences(crowded, random.Random(0), "full")
    empty = survey(volume, np.zeros_like(labels), many, spec=SPEC)
    assert scene_sentences(empty, random.Random(0)) == "MR, nothing of what was looked for"


def test_a_union_is_one_target_and_its_parts_are_no_neighbours() -> None:
    volume, labels = boxed(((4, 5), (3, 6), (14, 6)), ((9, 6), (3, 6), (14, 6)))
    scene = survey(volume, labels, {**NAMES, "both": (1, 2)}, spec=SPEC)
    whole = measure(scene, "both", (1, 2))
    part = measure(scene, "left lung", (1,))
    assert whole is not None
    assert part is not None
    assert whole.relations == ()
    assert whole.pieces == 1
    assert [r.other for r in part.relations] == ["spleen"]


def test_a_label_map_of_another_shape_is_refused() -> None:
    volume, labels = boxed(((4, 5), (3, 6), (14, 6)), greys=(300,))
    with pytest.raises(DatasetError, match="shape"):
        survey(volume, labels[1:], NAMES, spec=SPEC)


def test_large_label_values_are_found() -> None:
    volume, labels = boxed(((4, 5), (3, 6), (14, 6)), greys=(300,))
    scene: Scene = survey(volume, labels.astype(np.int32) * 200_000, {"a": (200_000,)}, spec=SPEC)
    assert scene.boxes == {200_000: (slice(4, 9), slice(3, 9), slice(14, 20))}

"""Drawing a head: as CT, and as contrast-enhanced T1 MR with tumours."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from seerseg_data.phantom_body import ALL_LABELS, Body, Bool, steps_mm


def draw_head(body: Body, rng: np.random.Generator) -> None:
    """Paint a head as CT shows it."""

    def some(value: float, spread: float = 0.1) -> float:
        return float(value * rng.uniform(1 - spread, 1 + spread))

    x, y, z = body.x, body.y, body.z
    scalp = body.ellipsoid((0, 0, 5), (some(80, 0.05), some(98, 0.05), 92), power=2.2) | (
        body.ellipsoid((0, 22, -50), (62, 72, 75)) & (z < 10)
    )
    scalp |= body.tube([(0, -35, -70), (0, -40, -140)], 52)
    body.paint(scalp, some(-20, 0.9))
    outer = body.ellipsoid((0, -2, 8), (72, 90, 83), power=2.2) & (z > -52 - 0.25 * y)
    inner = body.ellipsoid((0, -2, 8), (66, 84, 77), power=2.2) & (z > -45 - 0.25 * y)
    body.paint(outer, some(900), "skull")
    body.paint(inner, 8)  # cerebrospinal fluid
    brain = body.ellipsoid((0, -2, 10), (63, 81, 73), power=2.2) & (z > -40 - 0.2 * y)
    folds = ndimage.gaussian_filter(rng.normal(0, 1, x.shape).astype(np.float32), [max(0.7, 4.0 / s) for s in steps_mm(body)])
    depth = (np.abs(x) / 63) ** 2.2 + (np.abs(y + 2) / 81) ** 2.2 + (np.abs(z - 10) / 73) ** 2.2
    upper = z > -26 - 0.25 * y
    for side, word in ((1.0, "right"), (-1.0, "left")):
        half = brain & upper & (side * x > 1.2)
        body.paint(half, 30, f"{word} cerebral hemisphere")
        body.hu[half & ((depth > 0.78) | (folds > folds.std()))] = 39
    body.paint(body.ellipsoid((0, -50, -38), (some(48), some(30), some(24))) & inner, 36, "cerebellum")
    body.paint(body.tube([(0, -16, -12), (0, -24, -50), (0, -32, -110)], (14, 9)), 33, "brainstem")
    for side, word in ((1.0, "right"), (-1.0, "left")):
        shift = float(rng.uniform(-3, 3))
        body.paint(body.ellipsoid((side * 12, -12 + shift, 12), (some(9), some(15), some(10))), 41, f"{word} thalamus")
        horn = body.tube([(side * 9, 38, 14), (side * 10, 5, 26), (side * 20, -36, 18), (side * 30, -30, -6)], some(5.5, 0.35))
        body.paint(horn & inner, 6, f"{word} lateral ventricle")
        body.paint(body.ellipsoid((side * 32, 74, -30), (19, 19, 17)) & scalp, -80)
        body.paint(body.ellipsoid((side * 32, 78, -30), (12.5, 12.5, 12.5)), 12, f"{word} eyeball")
    body.paint(
        (body.ellipsoid((0, 80, -56), (17, 18, 20)) | body.ellipsoid((0, 30, -62), (14, 20, 14))) & scalp, -980
    )  # air of nose and throat
    jaw = body.tube([(46, 10, -62), (42, 44, -100), (0, 82, -106), (-42, 44, -100), (-46, 10, -62)], 8)
    body.paint(jaw & scalp, some(800), "mandible")
    spine = body.ellipsoid((0, -42, -112), (17, 15, 60)) & (z < -56)
    body.paint(spine, some(280), "cervical vertebral column")
    body.paint(body.tube([(0, -50, -60), (0, -52, -160)], 7), 28, "spinal cord")


FAT, MUSCLE, MARROW, CORTEX, FLUID, GREY, WHITE, DEEP, ENHANCED = 800.0, 320.0, 620.0, 40.0, 110.0, 400.0, 540.0, 470.0, 900.0
"""Signal of T1 after contrast, before bias and noise."""


class HeadMR:
    """One head. Paired structures are drawn one side after the other, each with a place and size of its own."""

    def __init__(self, body: Body, rng: np.random.Generator, noise: np.random.Generator) -> None:
        """noise: for what needs a number per voxel, so that the anatomy does not depend on how many there are."""
        self.body, self.rng, self.noise = body, rng, noise
        body.hu[:] = 8.0

    def some(self, value: float, spread: float = 0.1) -> float:
        """A number near `value`."""
        return float(value * self.rng.uniform(1 - spread, 1 + spread))

    def near(self, x: float, y: float, z: float, by: float = 1.5) -> tuple[float, float, float]:
        """A point within `by` mm of this one along each axis."""
        dx, dy, dz = self.rng.uniform(-by, by, 3)
        return (x + float(dx), y + float(dy), z + float(dz))

    def draw(self) -> None:
        """All parts; lesions last, so that they replace what they grow in."""
        self._shell()
        self._cerebrum()
        self._deep()
        self._eyes()
        if self.rng.random() < 0.75:
            self._tumour()
        self._metastases(int(self.rng.integers(0, 5)))

    def _shell(self) -> None:
        body, some = self.body, self.some
        scalp = body.ellipsoid((0, 0, 5), (some(80, 0.04), some(98, 0.04), 92), power=2.2)
        scalp |= body.ellipsoid((0, 22, -50), (62, 72, 75)) & (body.z < 10)
        scalp |= body.tube([(0, -35, -70), (0, -40, -140)], 52)
        body.paint(scalp, FAT)
        body.paint(scalp & body.ellipsoid((0, 0, 5), (75, 93, 87), power=2.2), MUSCLE)
        body.paint(scalp & (body.z < -50) & body.ellipsoid((0, 10, -75), (54, 66, 60)), MUSCLE)
        floor = -52 - 0.25 * body.y
        outer = body.ellipsoid((0, -2, 8), (73, 91, 84), power=2.2) & (body.z > floor)
        middle = body.ellipsoid((0, -2, 8), (70, 88, 81), power=2.2) & (body.z > floor + 3)
        inner = body.ellipsoid((0, -2, 8), (66, 84, 77), power=2.2) & (body.z > floor + 7)
        body.paint(outer, CORTEX, "skull")
        body.hu[middle & (body.labels > 0)] = MARROW  # marrow between two dark tables of bone; all of it is skull
        body.hu[body.ellipsoid((0, -2, 8), (68, 86, 79), power=2.2) & (body.labels > 0)] = CORTEX
        body.paint(inner, FLUID)
        self.inner: Bool = inner
        self.scalp: Bool = scalp

    def _cerebrum(self) -> None:
        body, some = self.body, self.some
        brain = body.ellipsoid((0, -2, 10), (63, 81, 73), power=2.2) & (body.z > -40 - 0.2 * body.y)
        folds = ndimage.gaussian_filter(
            self.noise.standard_normal(body.x.shape, dtype=np.float32), [max(0.7, 4.5 / s) for s in steps_mm(body)]
        )
        folds /= max(float(folds.std()), 1e-6)
        depth = (np.abs(body.x) / 63) ** 2.2 + (np.abs(body.y + 2) / 81) ** 2.2 + (np.abs(body.z - 10) / 73) ** 2.2
        upper = body.z > -26 - 0.25 * body.y
        for side, word in ((1.0, "right"), (-1.0, "left")):
            half = brain & upper & (side * body.x > 1.2)
            body.paint(half, some(WHITE, 0.04), f"{word} cerebral hemisphere")
            body.hu[half & (depth + 0.10 * folds > 0.74)] = some(GREY, 0.04)
            body.hu[half & (depth > 0.80) & (folds > 1.1)] = FLUID  # sulci
        body.paint(body.ellipsoid((0, -50, -38), (some(48), some(30), some(24))) & self.inner, some(GREY, 0.05), "cerebellum")
        body.hu[body.ellipsoid((0, -48, -38), (34, 19, 13)) & (folds > -0.4) & (body.labels == ALL_LABELS["cerebellum"])] = WHITE
        body.paint(body.tube([(0, -16, -12), (0, -24, -50), (0, -32, -110)], (14, 9)), some(WHITE, 0.05), "brainstem")
        body.paint(body.ellipsoid((0, -37, -34), (6, 5, 9)) & self.inner, FLUID, "fourth ventricle")

    def _deep(self) -> None:
        body, some, near = self.body, self.some, self.near
        arch = body.tube([(0, 36, 8), (0, 30, 26), (0, 0, 36), (0, -30, 28), (0, -40, 14)], some(4.5))
        body.paint(arch & (np.abs(body.x) < 12), some(WHITE + 40, 0.03), "corpus callosum")
        for side, word in ((1.0, "right"), (-1.0, "left")):
            body.paint(body.ellipsoid(near(side * 12, -12, 12), (some(9), some(15), some(10))), some(DEEP, 0.04), f"{word} thalamus")
            wide = some(5.5, 0.35)
            horn = body.tube([(side * 9, 38, 14), (side * 10, 5, 26), (side * 20, -36, 18), (side * 30, -30, -6)], wide)
            body.paint(horn & self.inner, FLUID, f"{word} lateral ventricle")
            beside = [(side * (14 + wide), 30.0, 12.0), (side * (15 + wide), 6.0, 22.0), (side * (18 + wide), -16.0, 20.0)]
            body.paint(body.tube(beside, (some(6.5), some(3.0))) & ~horn, some(DEEP, 0.04), f"{word} caudate nucleus")
            body.paint(body.ellipsoid(near(side * 28, 6, 4), (some(6.5), some(16), some(10))), some(DEEP, 0.04), f"{word} putamen")
            curve = [near(side * 24, -6, -22), (side * 27, -20.0, -17.0), (side * 24, -34.0, -6.0)]
            body.paint(body.tube(curve, (some(6.5), some(4.0))) & self.inner, some(GREY + 20, 0.04), f"{word} hippocampus")

    def _eyes(self) -> None:
        body = self.body
        for side, word in ((1.0, "right"), (-1.0, "left")):
            body.paint(body.ellipsoid((side * 32, 74, -30), (19, 19, 17)) & self.scalp, FAT)
            body.paint(body.ellipsoid((side * 32, 78, -30), (12.5, 12.5, 12.5)), FLUID, f"{word} eyeball")
        air = body.ellipsoid((0, 80, -56), (17, 18, 20)) | body.ellipsoid((0, 30, -62), (14, 20, 14))
        body.paint(air & self.scalp, 8.0)

    def _place(self, margin: float) -> tuple[float, float, float] | None:
        """A point inside a hemisphere, at least about `margin` of the way from its surface; None when the field has none."""
        body = self.body
        aim = self.rng.uniform((-45, -60, 0), (45, 55, 60))
        depth = (np.abs(body.x) / 63) ** 2 + (np.abs(body.y + 2) / 81) ** 2 + (np.abs(body.z - 10) / 73) ** 2
        hemispheres = (ALL_LABELS["right cerebral hemisphere"], ALL_LABELS["left cerebral hemisphere"])
        where = np.flatnonzero(np.isin(body.labels, hemispheres) & (depth < margin) & (np.abs(body.x) > 14) & (body.z > -10))
        if not where.size:
            return None
        points = np.stack([values.flat[where] for values in (body.x, body.y, body.z)], axis=1)
        x, y, z = points[int(np.argmin(((points - aim) ** 2).sum(axis=1)))]
        return float(x), float(y), float(z)

    def _tumour(self) -> None:
        """A core that does not enhance, in a rim that does, in oedema that stays inside the hemispheres."""
        body, some = self.body, self.some
        centre = self._place(0.55)
        if centre is None:
            return
        radius = self.rng.uniform(9, 20)
        radii = (some(radius, 0.2), some(radius, 0.2), some(radius, 0.2))
        brain = np.isin(body.labels, [ALL_LABELS[f"{word} cerebral hemisphere"] for word in ("right", "left")])
        oedema = body.ellipsoid(centre, (radii[0] * 1.7, radii[1] * 1.8, radii[2] * 1.5), tilt=float(self.rng.uniform(-0.6, 0.6))) & brain
        body.paint(oedema, some(300, 0.06), "peritumoural oedema")
        rim = body.ellipsoid(centre, radii) & self.inner
        body.paint(rim, some(ENHANCED, 0.06), "enhancing tumour")
        inside = self.rng.uniform(0.45, 0.75)
        core = body.ellipsoid(centre, (radii[0] * inside, radii[1] * inside, radii[2] * inside)) & self.inner
        body.paint(core, some(200, 0.1), "non-enhancing tumour core")

    def _metastases(self, count: int) -> None:
        """Small bright balls in the hemispheres, away from the tumour."""
        body = self.body
        tumour = [ALL_LABELS[name] for name in ("enhancing tumour", "non-enhancing tumour core")]
        for _ in range(count):
            centre = self._place(0.8)
            if centre is None:
                return
            radius = float(self.rng.uniform(3.5, 7.0))
            ball = body.ellipsoid(centre, (radius, radius, radius)) & self.inner
            if not np.isin(body.labels[ball], tumour).any():
                body.paint(ball, self.some(ENHANCED, 0.08), "brain metastasis")

"""Drawing a head: as CT, and as contrast-enhanced T1 MR with tumours."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from seerseg_data.phantom_body import Body, Bool, steps_mm


def draw_head(body: Body, rng: np.random.Generator) -> None:
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

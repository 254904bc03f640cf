"""Drawing a torso: chest, abdomen and pelvis. The order of the parts is the order of the random numbers: it must not change."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from seerseg_data.phantom_body import ALL_LABELS, LABELS, Body, Bool, Float, steps_mm


class Torso:
    """One torso. Attributes are what later parts need of earlier ones: all arrays (Z, Y, X), lengths in mm, intensities in HU."""

    skin: Bool
    muscle: Bool
    abdomen: Bool
    lung_r: Bool
    lung_l: Bool
    half_x: Float
    half_y: Float
    theta: Float
    z_fall: Float
    close: Float
    radius: Float
    dome: Float
    spine_y: Float
    contrast: float
    fat_mm: float
    cage_x: float
    cage_y: float
    cage_at: float
    apex_z: float

    def __init__(self, body: Body, rng: np.random.Generator, *, noise: np.random.Generator | None = None, distract: bool = True) -> None:
        """noise: for what needs a number per voxel, so that the rest does not depend on how many there are (the first kinds have
        one generator for both); distract: sometimes draw an effusion or a nodule that has no label of its own."""
        self.body, self.rng, self.noise, self.distract = body, rng, noise or rng, distract

    def some(self, value: float, spread: float = 0.12) -> float:
        """A number near `value`."""
        return float(value * self.rng.uniform(1 - spread, 1 + spread))

    def near(self, x: float, y: float, z: float, by: float = 6.0) -> tuple[float, float, float]:
        """A point within `by` mm of this one along each axis."""
        rng = self.rng
        return (x + float(rng.uniform(-by, by)), y + float(rng.uniform(-by, by)), z + float(rng.uniform(-by, by)))

    def draw(self) -> None:
        """All parts."""
        self._outline()
        self._cage()
        self._lungs()
        self._heart()
        self._upper_abdomen()
        self._bowel()
        self._pelvis()
        self._cage_bones()
        self._spine()

    def _outline(self) -> None:
        """Skin, fat, muscle, arms, table."""
        body, rng, some = self.body, self.rng, self.some
        x, y, z = self.body.x, self.body.y, self.body.z
        self.contrast = float(rng.choice([0.0, 60.0, 120.0]))  # enhancement of blood, HU
        self.fat_mm = float(rng.uniform(6, 28))
        # Outer wall: half axes in mm as functions of height; hips and shoulders are wider than the waist.
        hips, shoulders = 18 * np.exp(-(((z + 240) / 70) ** 2)), 25 * np.exp(-(((z - 280) / 45) ** 2))
        self.half_x = 150 + 16 * np.tanh((z - 60) / 60) + hips + shoulders + self.fat_mm
        hips, neck = 12 * np.exp(-(((z + 220) / 70) ** 2)), 22 * np.exp(-(((z - 300) / 45) ** 2))
        self.half_y = 98 + 8 * np.tanh((z - 40) / 60) + hips - neck + self.fat_mm
        wall = np.abs(x / self.half_x) ** 2.4 + np.abs(y / self.half_y) ** 2.4
        self.skin = wall <= 1
        body.paint(self.skin, some(-100, 0.1))
        self.muscle = (np.abs(x / (self.half_x - self.fat_mm)) ** 2.4 + np.abs(y / (self.half_y - self.fat_mm)) ** 2.4) <= 1
        body.paint(self.muscle, some(50))
        if rng.random() < 0.4:
            for side in (-1.0, 1.0):
                body.paint(body.tube([(side * 195, -10, 320), (side * 215, 0, -60)], 38), some(45))
        if rng.random() < 0.5:  # table
            body.paint((y < -self.half_y.max() - 8) & (y > -self.half_y.max() - 20) & (np.abs(x) < 180), 80)

    def _cage(self) -> None:
        """An ellipse that closes towards the apex; z_fall undoes the descent of the ribs towards the front. theta = 0 at the back."""
        some = self.some
        x, y, z = self.body.x, self.body.y, self.body.z
        self.cage_x, self.cage_y, self.cage_at = some(128, 0.06), some(88, 0.06), -2.0
        self.apex_z = some(262, 0.04)
        self.theta = np.arctan2(np.abs(x) / self.cage_x, -(y - self.cage_at) / self.cage_y)
        fall = some(62, 0.2) * (1 - np.cos(self.theta)) / 2 + 22 * np.sin(self.theta)
        self.z_fall = z + fall
        self.close = np.sqrt(np.clip(1 - (np.clip(self.z_fall - 90, 0, None) / (self.apex_z + 40 - 90)) ** 2.6, 0.02, 1))
        self.radius = np.sqrt((x / (self.cage_x * self.close)) ** 2 + ((y - self.cage_at) / (self.cage_y * self.close)) ** 2)
        self.spine_y = -58 + 12 * np.sin((z + 60) / 95) - 10 * np.exp(-(((z + 240) / 60) ** 2))

    def _lungs(self) -> None:
        """Lungs between the domes of the diaphragm and the cage, with vessels, sometimes an effusion or a nodule."""
        body, rng, some, near = self.body, self.rng, self.some, self.near
        x, y, z = self.body.x, self.body.y, self.body.z
        dome_r, dome_l = some(62, 0.3), some(52, 0.3)
        self.dome = np.where(
            x > 0,
            dome_r - 0.010 * (x - 68) ** 2 - 0.011 * (y - 5) ** 2,
            dome_l - 0.010 * (x + 68) ** 2 - 0.011 * (y - 5) ** 2,
        )
        inner = self.radius <= some(0.89, 0.03)
        medial = 16 + 16 * np.exp(-(((z - 90) / 120) ** 2)) * np.clip((y + 70) / 60, 0, 1.2)
        chest = inner & (z > self.dome) & (self.z_fall < self.apex_z + 38)
        lung_hu = float(rng.uniform(-880, -740))
        self.lung_r, self.lung_l = chest & (x > medial), chest & (x < -medial)
        body.paint(inner & (z <= self.dome) & (z > -90), some(-95))  # abdominal fat under the domes
        self.abdomen = (z <= np.minimum(self.dome, 40)) & (
            (np.abs(x / (self.half_x - self.fat_mm - 22)) ** 2.4 + np.abs((y - 4) / (self.half_y - self.fat_mm - 16)) ** 2.4) <= 1
        )
        body.paint(self.abdomen, some(-95))
        body.paint(inner & (z > self.dome) & (self.z_fall < self.apex_z + 38), some(-20, 0.8))  # mediastinum: fat and vessels
        body.paint(self.lung_r, lung_hu, "right lung")
        body.paint(self.lung_l, lung_hu, "left lung")
        speck = ndimage.gaussian_filter(self.noise.normal(0, 1, x.shape).astype(np.float32), 0.7)
        vessels = (self.lung_r | self.lung_l) & (speck > 1.0) & (np.abs(x) < 110)
        body.hu[vessels] = -350  # vessels stay part of the lung
        if self.distract and rng.random() < 0.35:  # effusion, dependent opacity: soft tissue that belongs to no lung
            side = rng.choice([-1.0, 1.0])
            body.paint((self.lung_r if side > 0 else self.lung_l) & (y < -45) & (z < self.dome + 40), 15)
        if self.distract and rng.random() < 0.35:  # nodule inside a lung, still lung
            at = near(float(rng.choice([-75, 75])), 0, 110, 25)
            body.hu[body.ellipsoid(at, (some(11), some(11), some(11))) & (self.lung_r | self.lung_l)] = 30

    def _heart(self) -> None:
        """Heart and great vessels, airways, oesophagus. The apex points to the left (x < 0)."""
        body, some, near = self.body, self.some, self.near
        heart_c = near(-18, 28, 62)
        body.paint(body.ellipsoid(heart_c, (some(56), some(42), some(46)), tilt=-0.5), 40 + 0.8 * self.contrast, "heart")
        blood = 42 + self.contrast * some(1.0, 0.3)
        aorta = [(-18.0, -22.0, 180.0), (-22.0, -40.0, 150.0), (-20.0, -38.0, 60.0), (-10.0, -32.0, 0.0), (-6.0, -28.0, -120.0)]
        body.paint(body.tube([(8, 20, 110), (14, 22, 150), (4, 8, 182), (-14, -12, 188), (-20, -32, 168)], some(14)), blood, "aorta")
        body.paint(body.tube(aorta, (some(13), some(9))), blood, "aorta")
        body.paint(body.tube([(18, 2, 60), (18, -18, 10), (16, -24, -130)], some(11)), blood - 0.3 * self.contrast, "inferior vena cava")
        body.paint(body.tube([(20, 5, 60), (18, 14, 150), (20, 10, 220)], some(9)), blood)
        trachea = body.tube([(0, -2, 330), (2, -8, 180)], some(9.5, 0.08))
        for side in (1.0, -1.0):
            trachea |= body.tube([(2, -8, 182), (side * 34, -12, 150)], (8.0, 6.0))
        body.paint(trachea & self.skin, -990, "trachea")
        body.paint(body.tube([(-3, -22, 330), (-4, -24, 100), (-14, -10, 45)], 7), 35, "oesophagus")

    def _upper_abdomen(self) -> None:
        """Liver, spleen, stomach, gallbladder, pancreas, duodenum, kidneys, adrenal glands."""
        body, rng, some, near = self.body, self.rng, self.some, self.near
        y, z = self.body.y, self.body.z
        below = (z <= self.dome - 2) & self.skin
        big = body.ellipsoid(near(68, 6, 8), (some(62), some(70), some(78)), power=2.3)
        lobe = body.ellipsoid(near(-8, 34, 26), (some(70), some(36), some(34)), tilt=-0.25)
        body.paint((big | lobe) & below & (self.radius < 0.93), 55 + 0.45 * self.contrast, "liver")
        body.paint(
            body.ellipsoid(near(-92, -34, 2), (some(24), some(38), some(48)), tilt=0.3) & below & (self.radius < 0.93),
            48 + 0.55 * self.contrast,
            "spleen",
        )
        stomach = body.ellipsoid(near(-58, 26, 2), (some(34), some(34), some(46)), tilt=0.5) & below & (body.labels != LABELS["spleen"])
        body.paint(stomach, float(rng.uniform(5, 60)), "stomach")
        body.hu[stomach & (y > some(42, 0.3))] = -900
        if rng.random() < 0.85:
            body.paint(body.ellipsoid(near(46, 44, -48, 4), (some(15), some(17), some(27)), tilt=0.4), some(8, 0.8), "gallbladder")
        body.paint(
            body.tube([(30, 8, -52), (6, 18, -34), (-36, 4, -20), (-66, -22, -6)], (some(13), some(9))),
            42 + 0.4 * self.contrast,
            "pancreas",
        )
        body.paint(body.tube([(34, 24, -38), (44, 10, -56), (40, 4, -96), (2, 2, -104)], some(12)), some(25, 0.6), "duodenum")
        for side, name, drop in ((1.0, "right kidney", -62.0), (-1.0, "left kidney", -44.0)):
            at = near(side * 62, -44, drop)
            kidney = body.ellipsoid(at, (some(29), some(25), some(54)), tilt=-0.25 * side)
            body.paint(kidney, 32 + self.contrast, name)
            sinus = body.ellipsoid((at[0] - side * 14, at[1] + 4, at[2]), (12, 9, 20))
            body.paint(sinus, float(rng.choice([-60.0, 10.0])))
            gland = "right adrenal gland" if side > 0 else "left adrenal gland"
            body.paint(
                body.tube([(at[0] - side * 20, at[1] + 16, at[2] + 56), (at[0] - side * 32, at[1] + 24, at[2] + 44)], 5),
                35 + 0.3 * self.contrast,
                gland,
            )

    def _bowel(self) -> None:
        """Coils in the middle, the colon as a frame."""
        body, some, near = self.body, self.some, self.near
        x = self.body.x
        coils = ndimage.gaussian_filter(self.noise.normal(0, 1, x.shape).astype(np.float32), [max(0.8, 9.0 / s) for s in steps_mm(body)])
        middle = body.ellipsoid((0, 34, -135), (80, 50, 70)) & (body.labels == 0) & self.abdomen
        body.paint(middle & (np.abs(coils) < coils.std() * 0.9), some(30, 0.5), "small bowel")
        frame = [
            (96, 0, -200),
            (104, 4, -100),
            (88, 24, -62),
            (20, 62, -92),
            (-60, 52, -60),
            (-100, -8, -40),
            (-102, -6, -150),
            (-84, 10, -205),
            (-20, -10, -225),
            (0, -40, -255),
        ]
        colon = body.tube([near(*p, by=7.0) for p in frame], some(21)) & (self.abdomen | self.muscle)
        free = colon & np.isin(body.labels, [0, LABELS["small bowel"]])
        body.paint(free, some(25, 0.7), "colon")
        body.hu[free & (coils > 0.3 * coils.std())] = -850

    def _pelvis(self) -> None:
        """Bladder, prostate, and on both sides muscles, hip bone and femur."""
        body, rng, some, near = self.body, self.rng, self.some, self.near
        x, y, z = self.body.x, self.body.y, self.body.z
        full = rng.uniform(0.6, 1.2)
        body.paint(body.ellipsoid(near(0, 42, -262), (some(44) * full, some(36) * full, some(34) * full)), some(6, 0.8), "urinary bladder")
        if rng.random() < 0.5:
            body.paint(body.ellipsoid(near(0, 24, -305, 3), (some(24), some(19), some(20))), 45, "prostate")
        for side, word in ((1.0, "right"), (-1.0, "left")):
            psoas = body.tube(
                [(side * 34, -44, -50), (side * 46, -30, -140), (side * 72, 10, -230), (side * 88, -2, -320)], (some(15), some(24))
            )
            body.paint(psoas & self.muscle, 55, f"{word} iliopsoas")
            back = body.tube(
                [(side * 34, -86, 150), (side * 36, -84, 40), (side * 38, -88, -150), (side * 26, -96, -215)], (some(21), some(27))
            )
            body.paint(back & self.muscle & (self.radius > 0.7), 48, f"{word} autochthonous back muscle")
            gluteus = body.ellipsoid(near(side * 78, -84, -268, 4), (some(62), some(34), some(66))) & self.muscle
            body.paint(gluteus, 52, f"{word} gluteus maximus")
            bowl = np.sqrt(((x - side * 30) / 92) ** 2 + ((y + 6) / 92) ** 2 + ((z + 190) / 118) ** 2)
            wing = (np.abs(bowl - 1) < 0.085) & (side * x > 34) & (z < -150) & (z > -262) & (y < 62) & (y > -80)
            socket = body.ellipsoid((side * 88, 2, -268), (34, 34, 34)) | body.tube([(side * 74, 26, -280), (side * 12, 56, -298)], 10)
            socket |= body.tube([(side * 78, -34, -280), (side * 58, -46, -318)], 12)
            body.paint((wing | socket) & self.muscle, 330, f"{word} hip bone")
            body.paint(body.ellipsoid((side * 92, 2, -272), (26, 26, 26)), 40)
            femur = body.ellipsoid((side * 92, 2, -272), (23, 23, 23)) | body.tube([(side * 92, 2, -272), (side * 136, -6, -310)], 16)
            femur |= body.tube([(side * 136, -6, -296), (side * 126, 0, -400)], 18)
            body.paint(femur, 380, f"{word} femur")

    def _cage_bones(self) -> None:
        """Ribs, sternum, clavicles, scapulae."""
        body, some = self.body, self.some
        x, y, z = self.body.x, self.body.y, self.body.z
        pitch = some(23.5, 0.05)
        index = np.round((self.apex_z - 2 - self.z_fall) / pitch)
        along_z = (self.apex_z - 2 - self.z_fall) - index * pitch
        reach = np.where(index <= 6, 2.55, np.where(index <= 9, 2.55 - 0.25 * (index - 6), 1.25 - 0.3 * (index - 10)))
        thick = some(5.2, 0.15)
        off = (self.radius - 0.955) * 0.5 * (self.cage_x + self.cage_y) * self.close
        rib = (
            ((off / thick) ** 2 + (along_z / (thick * 1.25)) ** 2 <= 1)
            & (index >= 0)
            & (index <= 11)
            & (self.theta < reach)
            & (self.theta > 0.22)
        )
        body.paint(rib & self.skin, some(330, 0.25), "ribs")
        body.hu[rib & ((off / thick) ** 2 + (along_z / (thick * 1.25)) ** 2 < 0.25)] = some(160, 0.3)
        breast = (
            (np.abs(x) < 17)
            & (np.abs(y - (self.cage_at + self.cage_y * 0.96 - 0.10 * np.clip(z - 120, 0, None))) < 7)
            & (z > 45)
            & (z < 195)
        )
        body.paint(breast & self.skin, some(230), "sternum")
        for side, word in ((1.0, "right"), (-1.0, "left")):
            body.paint(
                body.tube([(side * 22, 58, 196), (side * 80, 40, 226), (side * 140, 0, 232)], 7.5) & self.skin, 350, f"{word} clavicle"
            )
            blade = (
                (np.abs(self.radius - 1.17) < 0.05) & (side * x > 60) & (y < -20) & (z > 90) & (z < 90 + 1.5 * (side * x - 40)) & (z < 225)
            )
            blade |= body.tube([(side * 78, -82, 190), (side * 150, -30, 222)], 7.5)
            body.paint(blade & self.muscle, some(330), f"{word} scapula")

    def _spine(self) -> None:
        """Vertebrae by region, discs, sacrum, spinal cord."""
        body, rng, some = self.body, self.rng, self.some
        x, y, z = self.body.x, self.body.y, self.body.z
        width = np.interp(z, [-200, -60, 150, 270], [25, 23, 16, 12]).astype(np.float32)
        pace = np.interp(z, [-200, 0, 280], [36, 31, 20]).astype(np.float32)
        phase = np.cumsum(1 / np.interp(np.arange(-400, 420), [-200, 0, 280], [36, 31, 20]))
        level = np.interp(z, np.arange(-400, 420), phase).astype(np.float32) + float(rng.uniform(0, 1))
        gap = np.abs(level - np.round(level)) * pace < 3.2
        dy = y - self.spine_y
        corpus = (x / width) ** 2 + (dy / (width * 0.78)) ** 2 <= 1
        canal_y = self.spine_y - width * 0.78 - 9
        arch = ((x / 17) ** 2 + ((y - canal_y) / 15) ** 2 <= 1) & (np.abs(level - np.floor(level) - 0.55) < 0.36)
        spinous = (np.abs(x) < 4.5) & (y < canal_y - 9) & (y > canal_y - 44) & (np.abs(level - np.floor(level) - 0.6) < 0.3)
        transverse = (np.abs(x) < 38) & (np.abs(y - canal_y + 4) < 6) & (np.abs(level - np.floor(level) - 0.6) < 0.2)
        spine = (corpus | arch | spinous | transverse) & (z > -205)
        edges = [
            (-205.0, -10.0, "lumbar vertebral column"),
            (-10.0, 268.0, "thoracic vertebral column"),
            (268.0, 500.0, "cervical vertebral column"),
        ]
        bone = some(240, 0.25)
        for low, high, name in edges:
            body.paint(spine & (z >= low) & (z < high), bone, name)
            body.hu[(arch | spinous | transverse) & (z >= low) & (z < high)] = bone + 140
        body.paint(corpus & gap & (z > -205), 75, "intervertebral discs")
        tail = np.clip((-200 - z) / 90, 0, 1)
        sacrum = (np.abs(x) < 52 - 38 * tail) & (np.abs(y - (-62 - 40 * np.sin(np.pi * tail))) < 22 - 13 * tail) & (z < -200) & (z > -292)
        body.paint(sacrum & self.muscle, some(210), "sacrum")
        body.paint(((x / 9.5) ** 2 + ((y - canal_y) / 8.5) ** 2 <= 1) & (z > -240), 25, "spinal cord")
        outside = ~self.skin & (np.abs(x) <= self.half_x.max())
        body.labels[outside & (body.hu < -300)] = 0

    def draw_lesions(self) -> None:
        """Liver tumours, lung nodules and kidney cysts, each wholly inside its organ, with labels of their own."""
        rng = self.rng
        for _ in range(int(rng.integers(1, 5))):
            self._lesion("liver", "liver tumour", float(rng.uniform(7, 20)), 25 + 0.2 * self.contrast)
        for side in ("right", "left"):
            for _ in range(int(rng.integers(0, 3))):
                self._lesion(f"{side} lung", f"{side} lung nodule", float(rng.uniform(5, 13)), 30.0)
            if rng.random() < 0.5:
                self._lesion(f"{side} kidney", f"{side} kidney cyst", float(rng.uniform(6, 13)), 5.0)

    def _lesion(self, organ: str, name: str, radius_mm: float, hu: float) -> None:
        """One lesion whose centre lies well inside what is left of the organ; nothing where the field does not show it."""
        body = self.body
        inside = body.labels == ALL_LABELS[organ]
        aim = self.rng.uniform(0, 1, 3)
        radii = (self.some(radius_mm), self.some(radius_mm), self.some(radius_mm))
        brightness = self.some(hu, 0.2)
        rounds = max(1, round(0.5 * radius_mm / max(steps_mm(body))))
        boxes = ndimage.find_objects(inside.view(np.uint8))
        where = np.argwhere(ndimage.binary_erosion(inside[boxes[0]], iterations=rounds)) if boxes else np.zeros((0, 3), dtype=int)
        if not len(where):
            return
        wanted = aim * [part.stop - part.start for part in boxes[0]]
        z, y, x = where[int(np.argmin(((where - wanted) ** 2).sum(axis=1)))] + [part.start for part in boxes[0]]
        centre = (float(body.x[z, y, x]), float(body.y[z, y, x]), float(body.z[z, y, x]))
        body.paint(body.ellipsoid(centre, radii) & inside, brightness, name)

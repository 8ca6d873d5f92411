"""Render a synthetic frontal chest radiograph, with boxes and masks, from a patient, an exposure and opacities.

Anatomy is drawn on an image of at most 512 pixels a side (`WORK_SIDE`), which is then enlarged; noise and markers are drawn
at full resolution. Grey values add up as in an X-ray: soft tissue and bone add attenuation, aerated lung removes it, and an
opacity is lung without air.
"""

import cv2
import numpy as np

from kitlib.phantoms.patients import LUNG_ASPECT, Exposure, Opacity, Patient, Pneumothorax, Tube

WORK_SIDE = 512  # pixels of the longer side at which anatomy is drawn
LUNG_SHARE = 0.74  # share of the image that the lungs fill, the median of SIIM's training set
BOX_LEVEL = 0.35  # a box encloses the pixels with more than this share of the opacity's density
SHIFT = 4  # fractional bits of the coordinates that cv2 draws with

# A lung's outline from the apex down the chest wall, and at the top of the mediastinum; u counts from the midline outwards.
CHEST_WALL = [(0.30, -1.0), (0.50, -0.97), (0.72, -0.72), (0.88, -0.35), (0.96, 0.1), (1.0, 0.55), (1.0, 0.98)]
MEDIASTINUM_TOP = [(0.17, -0.45), (0.2, -0.85)]


def render(
    patient: Patient,
    exposure: Exposure,
    opacities: tuple[Opacity, ...] = (),
    *,
    pneumothoraces: tuple[Pneumothorax, ...] = (),
    tubes: tuple[Tube, ...] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays: the radiograph, and the boxes of its opacities.

    The radiograph is float32 (rows, columns), from 0 (black) to 1 (white). The boxes are an array (n, 4) of xmin, ymin,
    xmax, ymax in the radiograph's pixels: one row for each opacity that is `boxed`, in the order of `opacities`. The same
    arguments give the same pixels. For the mask of a pneumothorax see `draw_pneumothorax`.
    """
    view = _View(patient, exposure)
    rng = np.random.default_rng([patient.seed, 1])
    lungs = _lungs(patient, view, rng)
    # A lung is thinner towards its edges, so there is less air in the beam.
    air = view.blur(lungs, 0.012) * (0.45 + view.blur(lungs, 0.14) * np.float32(0.55 / 255)) * np.float32(1 / 255)
    boxes = [_replace_air(air, lungs > 127, opacity, view) for opacity in opacities]
    grey = _soft_tissue(patient, view) + _bones(view, rng) * np.float32(patient.bone)
    vessels = _vessels(view, rng)
    for pneumothorax in pneumothoraces:
        grey += _free_air(air, vessels, lungs, patient, pneumothorax, view)
    for tube in tubes:
        canvas = view.canvas()
        view.lines(canvas, _smooth(tube.points)[None], tube.width, 1.0)
        grey += view.blur(canvas, 0.006) * np.float32(tube.density / 255)
    texture = cv2.resize(rng.standard_normal((48, 48), dtype=np.float32), air.shape[::-1], interpolation=cv2.INTER_CUBIC)
    grey -= air * (np.float32(0.42) - vessels * np.float32(0.6) - texture * np.float32(0.012))
    boxed = [box for box, opacity in zip(boxes, opacities, strict=True) if opacity.boxed]
    return _expose(grey, exposure), np.array(boxed).reshape(-1, 4) * view.enlargement


def draw_masks(patient: Patient, exposure: Exposure) -> dict[str, np.ndarray]:
    """Return the masks "left_lung", "right_lung" and "heart" of the image that `render` draws, each bool (rows, columns).

    Left and right are the patient's. The lungs include opacities. The heart is the whole region between the lungs from the
    hila to the diaphragm, because the image shows no other border of the heart; it does not overlap the lungs.
    """
    right, left = _lung_outlines(patient, np.random.default_rng([patient.seed, 1]))
    outlines = {"left_lung": left, "right_lung": right, "heart": _heart_outline(patient)}
    masks = {name: _fill(outline, patient, exposure) for name, outline in outlines.items()}
    masks["heart"] &= ~(masks["left_lung"] | masks["right_lung"])
    return masks


def draw_pneumothorax(patient: Patient, exposure: Exposure, pneumothorax: Pneumothorax) -> np.ndarray:
    """Return the mask, bool (rows, columns), of a pneumothorax in the image that `render` draws."""
    chest, lung = _pleura(patient, pneumothorax)
    gap = _fill(chest, patient, exposure) & ~_fill(lung, patient, exposure)
    # Without splinters of a few pixels, where the two outlines cross.
    _, parts, sizes, _ = cv2.connectedComponentsWithStats(gap.astype(np.uint8))
    return gap & (parts == 1 + sizes[1:, cv2.CC_STAT_AREA].argmax())


class _View:
    """Draws shapes, given in thorax units, on canvases: images with at most 512 pixels (`WORK_SIDE`) on the longer side.

    A larger radiograph is made by enlarging a canvas. Canvases are uint8, with 255 for the value 1, because OpenCV draws
    smooth edges in 8-bit images only.
    """

    def __init__(self, patient: Patient, exposure: Exposure) -> None:
        shrink = min(1.0, WORK_SIDE / max(exposure.rows, exposure.columns))
        self.rows, self.columns = (max(1, round(side * shrink)) for side in (exposure.rows, exposure.columns))
        x, y = exposure.columns / self.columns, exposure.rows / self.rows
        self.enlargement = np.array([x, y, x, y])
        self.unit = LUNG_SHARE / 2 * min(self.columns, self.rows * LUNG_ASPECT) * exposure.zoom
        turn = np.deg2rad(exposure.rotation)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        self.matrix = self.unit * rotation @ np.diag([patient.width, patient.height / LUNG_ASPECT])
        self.origin = np.array([0.5 * self.columns, 0.48 * self.rows])
        self.origin += self.unit * np.array([exposure.shift_u, exposure.shift_v])

    def canvas(self) -> np.ndarray:
        return np.zeros((self.rows, self.columns), np.uint8)

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Convert points from thorax units (u, v) to canvas pixels (x, y); both arrays have shape (..., 2)."""
        return np.asarray(points, dtype=float) @ self.matrix.T + self.origin

    def fill(self, canvas: np.ndarray, outlines: np.ndarray, value: float = 1.0) -> None:
        """Fill closed outlines on the canvas with `value`, 0..1; `outlines` is (areas, points, 2) in thorax units."""
        for outline in self._fixed_point(outlines):
            cv2.fillPoly(canvas, [outline], round(255 * value), cv2.LINE_AA, SHIFT)

    def lines(self, canvas: np.ndarray, curves: np.ndarray, width: float, value: float) -> None:
        """Draw curves on the canvas with `value`, 0..1; `curves` is (curves, points, 2) in thorax units.

        The lines are `width` thorax units wide, and at least one pixel.
        """
        thickness = max(1, round(width * self.unit))
        # Broad lines are blurred later; smoothing their edges too would take four times as long.
        kind = cv2.LINE_AA if thickness == 1 else cv2.LINE_8
        cv2.polylines(canvas, self._fixed_point(curves), False, round(255 * value), thickness, kind, SHIFT)

    def blur(self, canvas: np.ndarray, sigma: float) -> np.ndarray:
        """Return a copy of the canvas, blurred with a Gaussian whose standard deviation is `sigma` thorax units.

        Wide blurs are computed on a reduced image, which makes no visible difference.
        """
        pixels = sigma * self.unit
        if pixels <= 3:
            return cv2.GaussianBlur(canvas, (0, 0), max(0.4, pixels), borderType=cv2.BORDER_REPLICATE)
        small = cv2.resize(canvas, None, fx=2 / pixels, fy=2 / pixels, interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), 2, borderType=cv2.BORDER_REPLICATE)
        return cv2.resize(small, canvas.shape[::-1], interpolation=cv2.INTER_LINEAR)

    def _fixed_point(self, points: np.ndarray) -> list[np.ndarray]:
        return list(np.round(self.pixels(points) * 2**SHIFT).astype(np.int32))


def _lungs(patient: Patient, view: _View, rng: np.random.Generator) -> np.ndarray:
    canvas = view.canvas()
    for outline in _lung_outlines(patient, rng):
        view.fill(canvas, outline[None])
    return canvas


def _lung_outlines(patient: Patient, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the closed outlines of the right lung and of the left lung, each an array (points, 2) in thorax units."""
    low = patient.diaphragm
    right_base = [(0.85, 0.78 + low), (0.6, 0.64 + low), (0.36, 0.68 + low), (0.24, 0.8 + low)]
    left_base = [(0.9, 0.88 + low), (0.76, 0.76 + low), (0.68, 0.77 + low)]
    outlines = []
    for side, base, edge in ((-1, right_base, _right_heart(patient)), (1, left_base, _left_heart(patient))):
        outline = np.array(CHEST_WALL + base + edge + MEDIASTINUM_TOP)
        outline += rng.normal(0, 0.012, outline.shape)
        outlines.append(_rounded(outline) * (side, 1))
    return outlines[0], outlines[1]


def _right_heart(patient: Patient) -> list[tuple[float, float]]:
    """Return points along the right lung's border with the heart, from the base upwards, in thorax units.

    Here u is the distance from the midline.
    """
    return [(0.3 * patient.heart, 0.55), (0.29 * patient.heart, 0.25), (0.2, 0.0)]


def _left_heart(patient: Patient) -> list[tuple[float, float]]:
    """Return points along the left lung's border with the heart, from the base upwards, in thorax units.

    Here u is the distance from the midline. The last two points are along the aorta.
    """
    heart = patient.heart
    return [(0.66 * heart, 0.7), (0.56 * heart, 0.4), (0.36, 0.12), (0.25, -0.05), (0.29, -0.2), (0.22, -0.32)]


def _heart_outline(patient: Patient) -> np.ndarray:
    """Return the heart's closed outline, an array (points, 2) in thorax units.

    It overlaps both lungs a little, so that no gap is left between them and the heart.
    """
    right, left = np.array(_right_heart(patient)) * (-1, 1), np.array(_left_heart(patient)[3::-1])
    base = np.array([(0.5 * patient.heart, 0.82 + patient.diaphragm), (-0.24, 0.8 + patient.diaphragm)])
    return _rounded(np.concatenate([right, left, base]) * (1.07, 1))


def _fill(outline: np.ndarray, patient: Patient, exposure: Exposure) -> np.ndarray:
    """Return the mask, bool (rows, columns), of a closed outline (points, 2) in thorax units."""
    view = _View(patient, exposure)
    # cv2 counts pixel centres from 0: scale about the pixels' corners, not their centres.
    points = (view.pixels(outline) + 0.5) * view.enlargement[:2] - 0.5
    canvas = np.zeros((exposure.rows, exposure.columns), np.uint8)
    cv2.fillPoly(canvas, [np.round(points * 2**SHIFT).astype(np.int32)], 255, cv2.LINE_AA, SHIFT)
    return canvas > 127


def _pleura(patient: Patient, pneumothorax: Pneumothorax) -> tuple[np.ndarray, np.ndarray]:
    """Return the outlines of the whole pleural space and of the collapsed lung, arrays (points, 2) in thorax units."""
    chest = _lung_outlines(patient, np.random.default_rng([patient.seed, 1]))[max(0, pneumothorax.side)]
    return chest, chest + pneumothorax.collapse * ((0.2 * pneumothorax.side, 0.95) - chest)


def _free_air(
    air: np.ndarray, vessels: np.ndarray, lungs: np.ndarray, patient: Patient, pneumothorax: Pneumothorax, view: _View
) -> np.ndarray:
    """Add a pneumothorax to `air` and `vessels`, in place; return the grey that the edge of the collapsed lung adds.

    The space between chest wall and lung contains only air. This space is darker than lung and has no vessels.
    """
    canvas, edge = view.canvas(), view.canvas()
    chest, lung = _pleura(patient, pneumothorax)
    view.fill(canvas, chest[None])
    view.fill(canvas, lung[None], 0.0)
    view.lines(edge, lung[None], 0.015, 1.0)
    gap = canvas * np.float32(1 / 255)
    air *= 1 + np.float32(0.45) * gap
    vessels *= 1 - gap
    return view.blur(edge, 0.006) * (lungs > 127) * np.float32(0.12 / 255)


def _replace_air(air: np.ndarray, inside: np.ndarray, opacity: Opacity, view: _View) -> np.ndarray:
    """Reduce the array `air` in place where the opacity is; return the opacity's box.

    The box is an array (4,): xmin, ymin, xmax, ymax in canvas pixels. `inside` is True in the lungs; elsewhere, `air` stays
    unchanged. An opacity outside the lungs gets a box of one pixel.
    """
    rng = np.random.default_rng([opacity.seed, 2])
    radius = np.array([opacity.radius_u, opacity.radius_v])
    centre = np.array([opacity.u, opacity.v])
    reach = view.pixels(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 1.5 * radius + centre)
    left, top = np.floor(reach.min(axis=0)).astype(int).clip(0, (view.columns - 2, view.rows - 2))
    right, bottom = np.ceil(reach.max(axis=0)).astype(int).clip((left + 2, top + 2), (view.columns, view.rows))
    # Converts pixels to coordinates in which the ellipse is a circle of radius 1.
    inverse = np.diag(1 / radius) @ np.linalg.inv(view.matrix)
    offset = inverse @ (np.array([left, top]) + 0.5 - view.pixels(centre))
    x, y = np.arange(right - left), np.arange(bottom - top)[:, None]
    u, v = (inverse[axis, 0] * x + inverse[axis, 1] * y + offset[axis] for axis in (0, 1))
    size = (right - left, bottom - top)
    waves = cv2.resize(rng.standard_normal((6, 6)), size, interpolation=cv2.INTER_CUBIC)
    grain = cv2.resize(rng.standard_normal((20, 20)), size, interpolation=cv2.INTER_CUBIC)
    rim = np.clip((1 + 0.1 * waves - np.sqrt(u * u + v * v)) / opacity.softness + 0.5, 0, 1)
    share = rim * rim * (3 - 2 * rim) * inside[top:bottom, left:right]
    cloudy = np.clip(share * (1 + 0.3 * opacity.softness * (0.5 * grain + 0.5 * waves)), 0, 1)
    air[top:bottom, left:right] *= (1 - opacity.density * cloudy).astype(np.float32)
    dense = share > BOX_LEVEL
    if not dense.any():  # outside the lungs, or smaller than a pixel: return the pixel at its centre
        middle = view.pixels(centre).clip(0, (view.columns - 1, view.rows - 1))
        return np.concatenate([middle, middle + 1])
    across, down = np.flatnonzero(dense.any(axis=0)), np.flatnonzero(dense.any(axis=1))
    return np.array([left + across[0], top + down[0], left + across[-1] + 1, top + down[-1] + 1], dtype=float)


def _soft_tissue(patient: Patient, view: _View) -> np.ndarray:
    """Return the grey that trunk, neck and arms give each canvas pixel, more in the mediastinum and below the diaphragm."""
    low = patient.diaphragm
    outline = [(-0.3, -4), (0.3, -4), (0.34, -1.4), (0.5, -1.22), (1.05, -1.16), (1.5, -1.0), (1.75, -0.5), (1.8, 0.3)]
    outline += [(2.0, 4.0), (1.75, 4.0), (1.5, 0.75), (1.28, 0.15), (1.2, 0.6), (1.22, 1.3), (1.25, 4.0), (-0.3, 4.0)]
    body, centre, below, gas = (view.canvas() for _ in range(4))
    for side in (-1, 1):
        view.fill(body, _mirrored(_rounded(outline), side))
    heart = [(-0.16, -4), (0.16, -4), (0.2, -0.3), (0.45, 0.4), (0.5, 0.8), (-0.3, 0.8), (-0.2, 0.1), (-0.17, -0.5)]
    view.fill(centre, np.array([heart]))
    abdomen = [(-1.15, 4), (-1.15, 1.05), (-0.6, 0.75 + low), (0, 0.9 + low), (0.65, 0.85 + low), (1.15, 1.1), (1.15, 4)]
    view.fill(below, np.array([abdomen]))
    thickness = patient.tissue + view.blur(centre, 0.1) * np.float32(0.15 / 255)
    thickness += view.blur(below, 0.15) * np.float32(0.12 / 255)
    if patient.stomach_gas:
        view.fill(gas, _ellipse(0.55, 1.04 + low, 0.17, 0.12))
        thickness -= view.blur(gas, 0.02) * np.float32(0.16 / 255)
    edge = view.blur(body, 0.02) * np.float32(0.4 / 255)
    return np.float32(0.03) + (edge + view.blur(body, 0.2) * (body > 127) * np.float32(0.6 / 255)) * thickness


def _bones(view: _View, rng: np.random.Generator) -> np.ndarray:
    """Return the grey that ribs, clavicles, shoulders and spine add to each canvas pixel; crossing bones add up."""
    t = np.linspace(0, 1, 14)
    rib = np.arange(10)[:, None]
    start = -1.02 + 0.19 * rib * rng.uniform(0.95, 1.05)
    reach = np.interp(rib, [0, 2, 5, 9], [0.5, 0.86, 1.03, 1.08])
    back_u = 0.1 + (reach - 0.1) * np.sin(t * np.pi / 2) ** 0.9
    back_v = start - 0.06 * np.sin(t * np.pi * 0.7) + 0.16 * t + 0.34 * t**3
    front_u = reach - (reach - 0.42) * t
    front_v = start + 0.42 + 0.36 * t - 0.06 * np.sin(t * np.pi)
    collar = np.stack([0.12 + 1.1 * t, -0.76 - 0.24 * t - 0.08 * np.sin(2 * np.pi * t)], axis=-1)
    blade = np.array([(0.98, -0.95), (1.16, -0.5), (1.2, -0.05)])
    back, front, shoulders, spine = (view.canvas() for _ in range(4))
    for side in (-1, 1):
        _bars(view, back, np.stack([side * back_u, back_v], axis=-1), 0.08, 0.3)
        _bars(view, front, np.stack([side * front_u, front_v], axis=-1)[1:7], 0.085, 0.17)
        view.fill(shoulders, _ellipse(side * 1.42, -0.82, 0.15, 0.17), 0.35)
        view.lines(shoulders, _mirrored(blade, side), 0.03, 0.2)
        _bars(view, shoulders, _mirrored(collar, side), 0.09, 0.4)
    level = np.arange(-1.9, 2.0, 0.21)[:, None, None]
    vertebra = np.array([(-0.12, 0), (0.12, 0), (0.11, 0.16), (-0.11, 0.16)])
    view.fill(spine, vertebra + level * (0, 1), 0.2)
    view.lines(spine, np.array([(0, 0.04), (0, 0.12)]) + level * (0, 1), 0.04, 0.33)
    bones = cv2.add(cv2.add(back, front), cv2.add(shoulders, spine))
    return view.blur(bones, 0.008) * np.float32(0.25 / 255)


def _bars(view: _View, canvas: np.ndarray, curves: np.ndarray, width: float, value: float) -> None:
    """Draw long bones along curves (see `_View.lines`), brighter at their edges than in the middle.

    The dense wall of a long bone is seen edge-on at its edges.
    """
    view.lines(canvas, curves, width, value)
    view.lines(canvas, curves, 0.65 * width, 0.6 * value)


def _vessels(view: _View, rng: np.random.Generator) -> np.ndarray:
    """Return an image of the pulmonary vessels, 0..1 for each canvas pixel; vessels get thinner away from the hila."""
    branches, hila = view.canvas(), view.canvas()
    t = np.linspace(0, 1, 8)
    for side in (-1, 1):
        bearing = rng.uniform(-1.3, 1.4, (22, 1)) + np.cumsum(rng.normal(0, 0.25, (22, 8)), axis=1) * t
        step = rng.uniform(0.3, 0.8, (22, 1)) / 8
        start = rng.normal(0, 0.03, (2, 22, 1))
        u = 0.25 + start[0] + np.cumsum(np.cos(bearing) * step, axis=1)
        v = 0.02 + 2.5 * start[1] + np.cumsum(np.sin(bearing) * step, axis=1)
        curves = np.stack([side * u, v], axis=-1)
        view.lines(branches, curves[:, 4:], 0.01, 0.16)
        view.lines(branches, curves[:, 2:5], 0.016, 0.22)
        view.lines(branches, curves[:8, :3], 0.028, 0.28)
        view.fill(hila, _ellipse(side * 0.27, 0.02, 0.09, 0.17), 0.4)
    return (view.blur(branches, 0.006) + view.blur(hila, 0.06).astype(np.float32)) * np.float32(1 / 255)


def _expose(grey: np.ndarray, exposure: Exposure) -> np.ndarray:
    """Return the canvas `grey` as the final image: at full resolution, with contrast, noise, unexposed border and marker."""
    grey = np.power(np.clip(grey * np.float32(exposure.gain), 0, 1), np.float32(exposure.gamma))
    if grey.shape != (exposure.rows, exposure.columns):
        grey = cv2.resize(grey, (exposure.columns, exposure.rows), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng([exposure.seed, 3]).standard_normal(grey.shape, dtype=np.float32)
    noise *= np.float32(exposure.noise)
    grey += noise
    longer = max(exposure.rows, exposure.columns)
    border = round(exposure.border * longer)
    if border:
        for edge in (grey[:border], grey[-border:], grey[:, :border], grey[:, -border:]):
            edge[:] = 0.01
    if exposure.marker:
        # The patient's right is at the image's left.
        x = round(exposure.columns * (0.04 if exposure.marker == "R" else 0.9))
        y = round(exposure.rows * exposure.marker_height)
        thickness = max(1, round(longer / 250))
        cv2.putText(grey, exposure.marker, (x, y), cv2.FONT_HERSHEY_SIMPLEX, longer / 450, 1.0, thickness, cv2.LINE_AA)
    return np.clip(grey, 0, 1, out=grey)


def _mirrored(points: np.ndarray, side: int) -> np.ndarray:
    """Place n points on the patient's right (`side` -1) or left (1); return an array (1, n, 2) in thorax units.

    In `points`, u is the distance from the midline.
    """
    return (np.asarray(points) * (side, 1))[None]


def _ellipse(u: float, v: float, radius_u: float, radius_v: float) -> np.ndarray:
    """Return the outline of an ellipse with the centre (u, v) as an array (1, 24, 2)."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([u + radius_u * np.cos(angle), v + radius_v * np.sin(angle)], axis=-1)[None]


def _smooth(points: np.ndarray) -> np.ndarray:
    """Return a smooth curve (n, 2) from the first to the last of `points`, by cutting corners three times (Chaikin 1974)."""
    for _ in range(3):
        start, end = points[:-1], points[1:]
        cut = np.stack([0.75 * start + 0.25 * end, 0.25 * start + 0.75 * end], axis=1).reshape(-1, 2)
        points = np.concatenate([points[:1], cut, points[-1:]])
    return points


def _rounded(points: list[tuple[float, float]] | np.ndarray) -> np.ndarray:
    """Return the closed outline `points` with its corners cut twice (Chaikin 1974), as an array (4 * points, 2)."""
    points = np.asarray(points, dtype=float)
    for _ in range(2):
        following = np.roll(points, -1, axis=0)
        points = np.stack([0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following], axis=1).reshape(-1, 2)
    return points

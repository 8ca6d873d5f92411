"""Synthetic frontal chest radiographs: a patient's anatomy, one exposure of it, and the opacities of a study class.

Anatomy is described in thorax units: u to the image's right, v downwards, the lungs within about -1..1 on both axes, the
patient's right lung at negative u. Everything smooth is drawn at `WORK_SIDE` pixels or less and enlarged; noise and markers
are drawn at full size. What is drawn follows how an X-ray comes about: soft tissue and bone add attenuation, aerated lung
takes it away, and an opacity is lung without its air.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from kitlib.classes import STUDY_CLASSES

WORK_SIDE = 512  # pixels of the longer side at which anatomy is drawn
LUNG_SHARE = 0.74  # share of the image that the lungs fill, as the median in SIIM's training set
LUNG_ASPECT = 1.17  # width over height of the pair of lungs, the same median
BOX_LEVEL = 0.35  # an opacity's box encloses what is denser than this share of its peak

# Right lung's outline from the apex down the chest wall, along the diaphragm and up the heart; u mirrored for the left one.
_CHEST_WALL = [
    (0.30, -1.0),
    (0.50, -0.97),
    (0.72, -0.72),
    (0.88, -0.35),
    (0.96, 0.1),
    (1.0, 0.55),
    (1.0, 0.98),
    (0.98, 0.98),
]
_MEDIAL_TOP = [(0.17, -0.45), (0.2, -0.85)]


@dataclass(frozen=True)
class Opacity:
    """One opacity: an ellipse with a wavy rim, in thorax units."""

    u: float
    v: float
    radius_u: float
    radius_v: float
    density: float  # share of the air that is replaced, 0..1
    softness: float  # width of the rim as a share of the radius: 0.15 a sharp consolidation, 0.8 ground glass
    seed: int


@dataclass(frozen=True)
class Patient:
    """What stays the same in all of a patient's images."""

    width: float  # body size against the mean, as height
    height: float
    heart: float  # how far the heart reaches to the left, against the mean
    diaphragm: float  # thorax units by which the diaphragm stands lower than the mean
    tissue: float  # attenuation of the soft tissue, grey
    bone: float
    seed: int


@dataclass(frozen=True)
class Exposure:
    """One image of a patient: its size, how the patient stands in it, and the machine's settings."""

    rows: int
    columns: int
    shift_u: float
    shift_v: float
    zoom: float
    rotation: float  # degrees
    gamma: float
    gain: float
    noise: float  # standard deviation, grey
    marker: str  # "L", "R" or "" for none, burnt in at the side it names
    marker_height: float  # v of the marker
    border: float  # unexposed margin, share of the longer side
    seed: int


def draw_patient(rng: np.random.Generator) -> Patient:
    return Patient(
        width=rng.uniform(0.93, 1.07),
        height=rng.uniform(0.92, 1.06),
        heart=rng.uniform(0.85, 1.15),
        diaphragm=rng.uniform(-0.08, 0.06),
        tissue=rng.uniform(0.56, 0.66),
        bone=rng.uniform(0.7, 1.2),
        seed=int(rng.integers(2**31)),
    )


def draw_exposure(rng: np.random.Generator, side: int) -> Exposure:
    """A random exposure whose longer side has `side` pixels; three in five are landscape, and none is square."""
    other = max(16, min(side - 1, round(side * rng.uniform(0.8, 0.97))))
    rows, columns = (other, side) if rng.random() < 0.6 else (side, other)
    return Exposure(
        rows=rows,
        columns=columns,
        shift_u=rng.uniform(-0.1, 0.1),
        shift_v=rng.uniform(-0.08, 0.08),
        zoom=rng.uniform(0.92, 1.08),
        rotation=rng.normal(0, 2.0),
        gamma=rng.uniform(0.85, 1.2),
        gain=rng.uniform(0.88, 1.05),
        noise=rng.uniform(0.006, 0.016),
        marker=str(rng.choice(["L", "R", ""], p=[0.45, 0.4, 0.15])),
        marker_height=rng.uniform(-1.0, -0.6),
        border=float(rng.choice([0.0, rng.uniform(0.005, 0.02)])),
        seed=int(rng.integers(2**31)),
    )


def draw_near_duplicate(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """The same exposure processed again: cropped by a few per cent, other contrast, other noise."""
    rows = round(exposure.rows * rng.uniform(0.97, 1.0))
    columns = round(exposure.columns * rng.uniform(0.97, 1.0))
    return replace(
        exposure,
        rows=rows,
        columns=columns,
        gamma=exposure.gamma * rng.uniform(0.93, 1.07),
        gain=exposure.gain * rng.uniform(0.95, 1.05),
        seed=int(rng.integers(2**31)),
    )


def draw_opacities(rng: np.random.Generator, study_class: str) -> tuple[Opacity, ...]:
    """Opacities as the reporting classes describe them (Litmanovich et al., J Thorac Imaging 2020).

    negative: none. typical: ground glass in both lungs, peripheral, lower; two or more. indeterminate: diffuse,
    perihilar, one lung or both. atypical: one sharp lobar consolidation or two nodules, in the upper zones.
    """
    if study_class not in STUDY_CLASSES:
        raise ValueError(f"no study class is called {study_class!r}; there are: {', '.join(STUDY_CLASSES)}")
    side = float(rng.choice([-1, 1]))
    if study_class == "negative":
        return ()
    if study_class == "typical":
        patches = [
            _patch(rng, s, (0.68, 0.8), (0.22, 0.5), (0.24, 0.33), (0.26, 0.38), (0.5, 0.68), 0.7) for s in (-1.0, 1.0)
        ]
        if rng.random() < 0.15:
            patches.append(_patch(rng, side, (0.58, 0.68), (-0.52, -0.44), (0.17, 0.22), (0.17, 0.22), (0.5, 0.65), 0.7))
        return tuple(patches)
    if study_class == "indeterminate":
        sides = (side,) if rng.random() < 0.65 else (-1.0, 1.0)
        return tuple(_patch(rng, s, (0.42, 0.5), (-0.15, 0.1), (0.22, 0.28), (0.28, 0.4), (0.48, 0.62), 0.85) for s in sides)
    if rng.random() < 0.7:
        return (_patch(rng, side, (0.45, 0.58), (-0.62, -0.48), (0.24, 0.32), (0.18, 0.26), (0.85, 0.95), 0.15),)
    upper = _patch(rng, side, (0.42, 0.6), (-0.65, -0.5), (0.13, 0.17), (0.12, 0.15), (0.8, 0.95), 0.15)
    return upper, _patch(rng, -side, (0.42, 0.66), (-0.6, -0.1), (0.13, 0.17), (0.12, 0.15), (0.8, 0.95), 0.15)


def render(patient: Patient, exposure: Exposure, opacities: tuple[Opacity, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """The radiograph (rows, columns) as float32 grey 0..1, 1 = white, and the opacities' boxes (n, 4) in its pixels.

    The same arguments give the same pixels. An opacity keeps its place in `opacities` and in the boxes.
    """
    view = _View(patient, exposure)
    rng = np.random.default_rng([patient.seed, 1])
    lungs = _lungs(patient, view, rng)
    inside = lungs > 0.5
    air = _soft_inside(lungs, view)
    boxes = np.empty((len(opacities), 4))
    for index, opacity in enumerate(opacities):
        boxes[index] = _replace_air(air, inside, opacity, view)
    grey = _body(patient, view) + patient.bone * _bones(view, rng)
    vessels = _vessels(view, rng)
    texture = cv2.resize(rng.standard_normal((48, 48), dtype=np.float32), air.shape[::-1], interpolation=cv2.INTER_CUBIC)
    grey -= air * (0.40 - 0.6 * vessels - 0.012 * texture)
    return _expose(grey, exposure), boxes * view.enlargement


class _View:
    """Thorax units to pixels of the drawing canvas, which is the image at `WORK_SIDE` or its own size if smaller."""

    def __init__(self, patient: Patient, exposure: Exposure) -> None:
        shrink = min(1.0, WORK_SIDE / max(exposure.rows, exposure.columns))
        self.rows, self.columns = (max(1, round(side * shrink)) for side in (exposure.rows, exposure.columns))
        x, y = exposure.columns / self.columns, exposure.rows / self.rows
        self.enlargement = np.array([x, y, x, y])
        self.unit = LUNG_SHARE / 2 * min(self.columns, self.rows * LUNG_ASPECT) * exposure.zoom
        turn = np.deg2rad(exposure.rotation)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        self.matrix = self.unit * rotation @ np.diag([patient.width, patient.height / LUNG_ASPECT])
        middle = np.array([self.columns * (0.5 + exposure.shift_u / 2), self.rows * (0.48 + exposure.shift_v / 2)])
        self.origin = middle

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """(n, 2) of u, v to (n, 2) of x, y."""
        return np.asarray(points, dtype=float) @ self.matrix.T + self.origin

    def canvas(self) -> np.ndarray:
        return np.zeros((self.rows, self.columns), np.float32)

    def fill(self, canvas: np.ndarray, points: np.ndarray, value: float = 1.0) -> None:
        cv2.fillPoly(canvas, [_fixed_point(self.pixels(points))], value, cv2.LINE_AA, _SHIFT)

    def line(self, canvas: np.ndarray, points: np.ndarray, width: float, value: float) -> None:
        """A curve `width` thorax units wide; at least a pixel."""
        thickness = max(1, round(width * self.unit))
        cv2.polylines(canvas, [_fixed_point(self.pixels(points))], False, value, thickness, cv2.LINE_AA, _SHIFT)

    def blur(self, canvas: np.ndarray, sigma: float) -> np.ndarray:
        """Gaussian blur of `sigma` thorax units. Wide ones are done on a reduced copy, which nobody can tell apart."""
        pixels = sigma * self.unit
        if pixels > 6:
            factor = 3 / pixels
            small = cv2.resize(canvas, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
            small = cv2.GaussianBlur(small, (0, 0), 3, borderType=cv2.BORDER_REPLICATE)
            return cv2.resize(small, canvas.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return cv2.GaussianBlur(canvas, (0, 0), max(0.4, pixels), borderType=cv2.BORDER_REPLICATE)


_SHIFT = 4  # fractional bits of the coordinates that cv2 draws with


def _fixed_point(points: np.ndarray) -> np.ndarray:
    return np.round(points * 2**_SHIFT).astype(np.int32).reshape(-1, 1, 2)


def _rounded(points: list[tuple[float, float]] | np.ndarray, times: int = 2) -> np.ndarray:
    """A closed outline with its corners cut (Chaikin 1974)."""
    points = np.asarray(points, dtype=float)
    for _ in range(times):
        following = np.roll(points, -1, axis=0)
        points = np.stack([0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following], axis=1).reshape(-1, 2)
    return points


def _lungs(patient: Patient, view: _View, rng: np.random.Generator) -> np.ndarray:
    """Where there is lung: 1 inside, 0 outside, edges anti-aliased."""
    low, heart = patient.diaphragm, patient.heart
    right_base = [(0.85, 0.78 + low), (0.6, 0.64 + low), (0.36, 0.68 + low), (0.24, 0.8 + low)]
    right_heart = [(0.3 * heart, 0.55), (0.29 * heart, 0.25), (0.2, 0.0)]
    left_base = [(0.9, 0.88 + low), (0.76, 0.76 + low), (0.68, 0.77 + low)]
    left_heart = [(0.66 * heart, 0.7), (0.56 * heart, 0.4), (0.36, 0.12), (0.25, -0.05), (0.29, -0.2), (0.22, -0.32)]
    canvas = view.canvas()
    for side, base, edge in ((-1, right_base, right_heart), (1, left_base, left_heart)):
        points = np.array(_CHEST_WALL + base + edge + _MEDIAL_TOP)
        points += rng.normal(0, 0.012, points.shape)
        view.fill(canvas, _rounded(points) * (side, 1))
    return canvas


def _soft_inside(lungs: np.ndarray, view: _View) -> np.ndarray:
    """Amount of air in the beam: a lung is thinner towards its edges."""
    return view.blur(lungs, 0.012) * (0.45 + 0.55 * view.blur(lungs, 0.14))


def _replace_air(air: np.ndarray, inside: np.ndarray, opacity: Opacity, view: _View) -> np.ndarray:
    """Take the opacity's share out of `air`, in place; return its box (4,) in canvas pixels."""
    rng = np.random.default_rng([opacity.seed, 2])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 1.5 * (opacity.radius_u, opacity.radius_v)
    reach = view.pixels(corners + np.array([opacity.u, opacity.v]))
    left, top = np.floor(reach.min(axis=0)).astype(int).clip(0, (view.columns - 2, view.rows - 2))
    right, bottom = np.ceil(reach.max(axis=0)).astype(int).clip((left + 2, top + 2), (view.columns, view.rows))
    x, y = np.meshgrid(np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
    inverse = np.linalg.inv(view.matrix)
    u = (inverse[0, 0] * (x - view.origin[0]) + inverse[0, 1] * (y - view.origin[1]) - opacity.u) / opacity.radius_u
    v = (inverse[1, 0] * (x - view.origin[0]) + inverse[1, 1] * (y - view.origin[1]) - opacity.v) / opacity.radius_v
    waves = cv2.resize(rng.standard_normal((6, 6)), x.shape[::-1], interpolation=cv2.INTER_CUBIC)
    grain = cv2.resize(rng.standard_normal((24, 24)), x.shape[::-1], interpolation=cv2.INTER_CUBIC)
    rim = (1 + 0.12 * waves - np.hypot(u, v)) / opacity.softness + 0.5
    share = np.clip(rim, 0, 1)
    share = share * share * (3 - 2 * share)
    share *= np.clip(1 + 0.25 * opacity.softness * grain, 0, 1.3) * inside[top:bottom, left:right]
    area = air[top:bottom, left:right]
    area *= (1 - opacity.density * share.clip(0, 1)).astype(np.float32)
    dense = share > BOX_LEVEL
    if not dense.any():  # wholly outside the lungs, or smaller than a pixel: its middle, a pixel wide
        middle = view.pixels(np.array([[opacity.u, opacity.v]]))[0].clip(0, (view.columns - 1, view.rows - 1))
        return np.array([*middle, *(middle + 1)])
    across, down = np.flatnonzero(dense.any(axis=0)), np.flatnonzero(dense.any(axis=1))
    return np.array([left + across[0], top + down[0], left + across[-1] + 1, top + down[-1] + 1], dtype=float)


def _body(patient: Patient, view: _View) -> np.ndarray:
    """Soft tissue: trunk, neck and arms against air, brighter in the mediastinum and below the diaphragm."""
    canvas = view.canvas()
    outline = [(-0.1, -2.6), (0.3, -2.6), (0.34, -1.4), (0.5, -1.22), (1.05, -1.16), (1.5, -1.0), (1.75, -0.5), (1.8, 0.3)]
    outline += [(2.0, 3.0), (1.75, 3.0), (1.5, 0.75), (1.28, 0.15), (1.2, 0.6), (1.22, 1.3), (1.25, 3.0), (-0.1, 3.0)]
    for side in (-1, 1):
        view.fill(canvas, _rounded(outline) * (side, 1))
    body = 0.4 * view.blur(canvas, 0.02) + 0.6 * view.blur(canvas, 0.2) * canvas
    centre = view.canvas()
    mediastinum = [
        (-0.16, -2.2),
        (0.16, -2.2),
        (0.2, -0.3),
        (0.45, 0.4),
        (0.5, 0.8),
        (-0.3, 0.8),
        (-0.2, 0.1),
        (-0.17, -0.5),
    ]
    view.fill(centre, np.array(mediastinum))
    low = patient.diaphragm
    abdomen = [
        (-1.15, 2.6),
        (-1.15, 1.05),
        (-0.6, 0.75 + low),
        (0.0, 0.9 + low),
        (0.65, 0.85 + low),
        (1.15, 1.1),
        (1.15, 2.6),
    ]
    below = view.canvas()
    view.fill(below, np.array(abdomen))
    thickness = patient.tissue + 0.15 * view.blur(centre, 0.1) + 0.12 * view.blur(below, 0.15)
    if patient.seed % 3 == 0:  # gas in the stomach
        gas = view.canvas()
        angle = np.linspace(0, 2 * np.pi, 24)
        view.fill(gas, np.stack([0.55 + 0.17 * np.cos(angle), 1.04 + low + 0.12 * np.sin(angle)], axis=1))
        thickness -= 0.16 * view.blur(gas, 0.02)
    return 0.03 + body * thickness


def _bones(view: _View, rng: np.random.Generator) -> np.ndarray:
    """Ribs with bright rims, clavicles, shoulders and the spine, as grey to add."""
    t = np.linspace(0, 1, 14)
    bones = view.canvas()
    layer = view.canvas()
    pitch = rng.uniform(0.95, 1.05)
    for side in (-1, 1):
        for rib in range(10):
            start = -1.02 + 0.19 * rib * pitch
            reach = np.interp(rib, [0, 2, 5, 9], [0.5, 0.86, 1.03, 1.08])
            u = 0.1 + (reach - 0.1) * np.sin(t * np.pi / 2) ** 0.9
            v = start - 0.09 * np.sin(t * np.pi * 0.8) + 0.42 * t**2.6
            _bar(view, layer, np.stack([side * u, v], axis=1), 0.075, 0.055)
            if 1 <= rib <= 6:
                u = reach - (reach - 0.42) * t
                v = start + 0.36 + 0.3 * t - 0.1 * np.sin(t * np.pi)
                _bar(view, layer, np.stack([side * u, v], axis=1), 0.085, 0.03)
            bones += layer
            layer[:] = 0
        _bar(
            view,
            layer,
            np.stack([side * (0.12 + 1.1 * t), -0.76 - 0.24 * t - 0.08 * np.sin(2 * np.pi * t)], axis=1),
            0.09,
            0.1,
        )
        angle = np.linspace(0, 2 * np.pi, 24)
        view.fill(layer, np.stack([side * (1.42 + 0.15 * np.cos(angle)), -0.82 + 0.17 * np.sin(angle)], axis=1), 0.1)
        view.line(layer, np.array([(side * 0.98, -0.95), (side * 1.16, -0.5), (side * 1.2, -0.05)]), 0.03, 0.05)
        bones += layer
        layer[:] = 0
    for level in np.arange(-1.9, 2.0, 0.21):
        view.fill(layer, np.array([(-0.12, level), (0.12, level), (0.11, level + 0.16), (-0.11, level + 0.16)]), 0.045)
        view.line(layer, np.array([(0, level + 0.04), (0, level + 0.12)]), 0.04, 0.075)
    bones += layer
    return view.blur(bones, 0.008)


def _bar(view: _View, canvas: np.ndarray, points: np.ndarray, width: float, value: float) -> None:
    """A bone seen from the side: its compact rims are brighter than its middle."""
    view.line(canvas, points, width, value)
    view.line(canvas, points, 0.6 * width, 0.6 * value)


def _vessels(view: _View, rng: np.random.Generator) -> np.ndarray:
    """Pulmonary vessels that thin out from the hila, 0..about 0.3."""
    canvas = view.canvas()
    for side in (-1, 1):
        for _ in range(16):
            bearing = rng.uniform(-1.25, 1.35)
            length = rng.uniform(0.35, 0.75)
            t = np.linspace(0, 1, 7)
            bend = bearing + rng.normal(0, 0.35) * t
            u = 0.27 + np.cumsum(np.cos(bend)) * length / 7
            v = 0.02 + np.cumsum(np.sin(bend)) * length / 7
            points = np.stack([side * u, v], axis=1)
            view.line(canvas, points[:3], 0.035, 0.22)
            view.line(canvas, points[2:5], 0.02, 0.15)
            view.line(canvas, points[4:], 0.01, 0.1)
    hila = view.canvas()
    for side in (-1, 1):
        angle = np.linspace(0, 2 * np.pi, 16)
        view.fill(hila, np.stack([side * 0.27 + 0.09 * np.cos(angle), 0.02 + 0.17 * np.sin(angle)], axis=1), 0.35)
    return view.blur(canvas, 0.006) + view.blur(hila, 0.05)


def _expose(grey: np.ndarray, exposure: Exposure) -> np.ndarray:
    """Enlarge to the image's size; add contrast, noise, the unexposed border and the marker."""
    grey = np.power(np.clip(grey * exposure.gain, 0, 1), exposure.gamma)
    if grey.shape != (exposure.rows, exposure.columns):
        grey = cv2.resize(grey, (exposure.columns, exposure.rows), interpolation=cv2.INTER_CUBIC)
    rng = np.random.default_rng([exposure.seed, 3])
    noise = rng.standard_normal(grey.shape, dtype=np.float32)
    noise *= exposure.noise
    grey += noise
    longer = max(exposure.rows, exposure.columns)
    border = round(exposure.border * longer)
    if border:
        grey[:border], grey[-border:], grey[:, :border], grey[:, -border:] = 0.01, 0.01, 0.01, 0.01
    if exposure.marker:
        # The patient's right is at the image's left.
        x = round(exposure.columns * (0.04 if exposure.marker == "R" else 0.9))
        y = round(exposure.rows * (0.5 + 0.42 * exposure.marker_height))
        y = min(max(y, round(0.08 * longer)), exposure.rows - 2)
        thickness = max(1, round(longer / 250))
        cv2.putText(grey, exposure.marker, (x, y), cv2.FONT_HERSHEY_SIMPLEX, longer / 450, 1.0, thickness, cv2.LINE_AA)
    return np.clip(grey, 0, 1, out=grey)


def _patch(
    rng: np.random.Generator,
    side: float,
    u: tuple[float, float],
    v: tuple[float, float],
    radius_u: tuple[float, float],
    radius_v: tuple[float, float],
    density: tuple[float, float],
    softness: float,
) -> Opacity:
    return Opacity(
        side * rng.uniform(*u),
        rng.uniform(*v),
        rng.uniform(*radius_u),
        rng.uniform(*radius_v),
        rng.uniform(*density),
        softness,
        int(rng.integers(2**31)),
    )

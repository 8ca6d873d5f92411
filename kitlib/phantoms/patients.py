"""Draw the contents of a phantom radiograph at random: a patient, an exposure, and opacities for a study class or finding.

Positions are in thorax units: u points to the image's right, v downwards, and the lungs are within about -1..1 on both axes.
The patient's right lung is at negative u.
"""

from dataclasses import dataclass, replace

import numpy as np

from kitlib.classes import STUDY_CLASSES

LUNG_ASPECT = 1.17  # width over height of the pair of lungs, the median of SIIM's training set


@dataclass(frozen=True)
class Opacity:
    """One opacity: an ellipse with a wavy rim. Centre and radii are in thorax units; the lungs are within about -1..1."""

    u: float
    v: float
    radius_u: float
    radius_v: float
    density: float  # share of the air that is replaced, 0..1
    softness: float  # width of the rim as a share of the radius: 0.15 for a sharp consolidation, 0.8 for ground glass
    seed: int
    boxed: bool = True  # False for effusions, which annotators do not box


@dataclass(frozen=True)
class Pneumothorax:
    """Air around a collapsed lung, whose outline has moved the share `collapse` (0..1) of the way to its lower inner end."""

    side: int  # -1 for the patient's right lung, 1 for the left one
    collapse: float


@dataclass(frozen=True)
class Tube:
    """A catheter, tube or line along a smoothed curve of `points`, an array (n, 2) of (u, v) in thorax units."""

    points: np.ndarray
    width: float  # thorax units
    density: float  # grey that it adds, 0..1


@dataclass(frozen=True)
class Patient:
    """The anatomy of one patient, which is the same in all of the patient's images."""

    width: float  # relative to the mean, like `height`
    height: float
    heart: float  # how far the heart reaches to the left, relative to the mean
    diaphragm: float  # thorax units by which the diaphragm is lower than the mean
    tissue: float  # attenuation of the soft tissue, grey 0..1
    bone: float  # attenuation of the bones, relative to the mean
    stomach_gas: bool
    seed: int


@dataclass(frozen=True)
class Exposure:
    """How one image of a patient is taken: its size, the patient's position in it, and the machine's settings."""

    rows: int
    columns: int
    shift_u: float
    shift_v: float
    zoom: float
    rotation: float  # degrees
    gamma: float
    gain: float
    noise: float  # standard deviation, grey 0..1
    marker: str  # "L" or "R", burnt in on that side of the patient, or "" for none
    marker_height: float  # vertical position of the marker, share of the rows
    border: float  # unexposed margin, share of the longer side
    seed: int


def draw_patient(rng: np.random.Generator) -> Patient:
    """Return a patient with random anatomy."""
    return Patient(
        width=rng.uniform(0.92, 1.08),
        height=rng.uniform(0.9, 1.08),
        heart=rng.uniform(0.82, 1.18),
        diaphragm=rng.uniform(-0.12, 0.08),
        tissue=rng.uniform(0.56, 0.66),
        bone=rng.uniform(0.7, 1.3),
        stomach_gas=bool(rng.random() < 0.35),
        seed=int(rng.integers(2**31)),
    )


def draw_exposure(rng: np.random.Generator, side: int) -> Exposure:
    """Return a random exposure whose longer side has `side` pixels. Three in five are landscape, and none is square."""
    other = min(side - 1, round(side * rng.uniform(0.8, 0.97)))
    rows, columns = (other, side) if rng.random() < 0.6 else (side, other)
    return Exposure(
        rows=rows,
        columns=columns,
        shift_u=rng.uniform(-0.14, 0.14),
        shift_v=rng.uniform(-0.1, 0.1),
        zoom=rng.uniform(0.9, 1.08),
        rotation=rng.normal(0, 2.5),
        gamma=rng.uniform(0.85, 1.2),
        gain=rng.uniform(0.88, 1.05),
        noise=rng.uniform(0.006, 0.016),
        marker=str(rng.choice(["L", "R", ""], p=[0.45, 0.4, 0.15])),
        marker_height=rng.uniform(0.1, 0.25),
        border=float(rng.choice([0.0, rng.uniform(0.005, 0.02)])),
        seed=int(rng.integers(2**31)),
    )


def draw_near_duplicate(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Return a near-duplicate of `exposure`: cropped by up to 4 % of rows and columns, with other contrast and noise."""
    rows = round(exposure.rows * rng.uniform(0.96, 1.0))
    columns = round(exposure.columns * rng.uniform(0.96, 1.0))
    # The zoom compensates for the smaller image, so that the patient's size in pixels stays the same.
    shrunk = min(columns, rows * LUNG_ASPECT) / min(exposure.columns, exposure.rows * LUNG_ASPECT)
    return replace(
        exposure,
        rows=rows,
        columns=columns,
        zoom=exposure.zoom / shrunk,
        gamma=exposure.gamma * rng.uniform(0.93, 1.07),
        gain=exposure.gain * rng.uniform(0.95, 1.05),
        seed=int(rng.integers(2**31)),
    )


def draw_opacities(rng: np.random.Generator, study_class: str) -> tuple[Opacity, ...]:
    """Return random opacities for one of SIIM's study classes, following the published definitions for reporting.

    negative: no opacities. typical: peripheral ground-glass opacities low in both lungs, sometimes another one higher up.
    indeterminate: diffuse perihilar opacities in one lung or both. atypical: one sharp lobar consolidation, or two nodules
    in the upper zones, or a pleural effusion, which has no box. Source: Litmanovich et al., Journal of Thoracic Imaging
    2020. Raises ValueError for an unknown class.
    """
    side = float(rng.choice([-1, 1]))
    if study_class == "negative":
        return ()
    if study_class == "typical":
        lower = [_patch(rng, s, (0.66, 0.8), (0.2, 0.48), (0.25, 0.34), (0.27, 0.4), (0.5, 0.7), 0.7) for s in (-side, side)]
        if rng.random() < 0.12:
            lower.append(_patch(rng, side, (0.58, 0.68), (-0.5, -0.42), (0.18, 0.22), (0.17, 0.22), (0.5, 0.65), 0.7))
        return tuple(lower)
    if study_class == "indeterminate":
        sides = (side,) if rng.random() < 0.65 else (-side, side)
        return tuple(_patch(rng, s, (0.42, 0.5), (-0.15, 0.1), (0.23, 0.3), (0.3, 0.42), (0.5, 0.65), 0.85) for s in sides)
    if study_class == "atypical":
        kind = rng.choice(["consolidation", "nodules", "effusion"], p=[0.7, 0.2, 0.1])
        if kind == "consolidation":
            return (_patch(rng, side, (0.46, 0.58), (-0.62, -0.46), (0.27, 0.36), (0.22, 0.3), (0.9, 1.0), 0.15),)
        if kind == "nodules":
            nodule = ((0.15, 0.19), (0.15, 0.19), (0.9, 1.0), 0.15)
            return (
                _patch(rng, side, (0.42, 0.6), (-0.65, -0.5), *nodule),
                _patch(rng, -side, (0.45, 0.66), (-0.6, -0.15), *nodule),
            )
        fluid = _patch(rng, side, (0.85, 0.95), (0.95, 1.05), (0.5, 0.6), (0.4, 0.5), (0.9, 1.0), 0.15)
        return (replace(fluid, boxed=False),)
    raise ValueError(f"unknown study class {study_class!r}; valid: {', '.join(STUDY_CLASSES)}")


# NIH's findings that phantoms show. Each looks different, so that a network can tell them apart.
DRAWN_FINDINGS = ("Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Consolidation", "No Finding")


def draw_finding(rng: np.random.Generator, finding: str, patient: Patient) -> tuple[Patient, tuple[Opacity, ...]]:
    """Return the patient, with the heart's size adapted to the finding, and random opacities that show the finding.

    `finding` is one of DRAWN_FINDINGS. Cardiomegaly is a heart larger than that of patients without it. Infiltration is
    ground glass in the middle zones, in both lungs in half of the images. Pneumonia is a half-dense, half-sharp patch low in
    one lung, Consolidation a dense, sharp patch high in one lung. Mass (large) and Nodule (small) are round, dense and
    sharp. Effusion is fluid in the lower corner of one lung, without a box. Raises ValueError for another finding.
    """
    if finding not in DRAWN_FINDINGS:
        raise ValueError(f"phantoms cannot show {finding!r}; valid: {', '.join(DRAWN_FINDINGS)}")
    heart = rng.uniform(1.3, 1.45) if finding == "Cardiomegaly" else min(patient.heart, 1.08)
    patient, side = replace(patient, heart=float(heart)), float(rng.choice([-1, 1]))
    if finding == "Infiltration":
        sides = (side,) if rng.random() < 0.5 else (-side, side)
        return patient, tuple(
            _patch(rng, s, (0.5, 0.66), (-0.1, 0.3), (0.24, 0.32), (0.28, 0.4), (0.5, 0.65), 0.8) for s in sides
        )
    if finding == "Pneumonia":
        return patient, (_patch(rng, side, (0.56, 0.68), (0.25, 0.45), (0.24, 0.3), (0.2, 0.28), (0.75, 0.85), 0.4),)
    if finding == "Consolidation":
        return patient, (_patch(rng, side, (0.46, 0.58), (-0.62, -0.4), (0.27, 0.36), (0.22, 0.3), (0.9, 1.0), 0.15),)
    if finding in ("Mass", "Nodule"):
        radius = rng.uniform(0.17, 0.22) if finding == "Mass" else rng.uniform(0.08, 0.11)
        opacity = _patch(rng, side, (0.45, 0.68), (-0.5, 0.35), (radius, radius), (radius, radius), (0.9, 1.0), 0.15)
        return patient, (opacity,)
    if finding == "Effusion":
        fluid = _patch(rng, side, (0.85, 0.95), (0.95, 1.05), (0.5, 0.6), (0.4, 0.5), (0.9, 1.0), 0.15)
        return patient, (replace(fluid, boxed=False),)
    return patient, ()


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
    """Return a random opacity. Each pair (low, high) is a range from which one value is drawn.

    `side` is -1 for the left of the image and 1 for its right; `u` is the range of the distance from the midline.
    """
    u_drawn, v_drawn, radius_u_drawn, radius_v_drawn, density_drawn = (
        float(rng.uniform(*bounds)) for bounds in (u, v, radius_u, radius_v, density)
    )
    seed = int(rng.integers(2**31))
    return Opacity(side * u_drawn, v_drawn, radius_u_drawn, radius_v_drawn, density_drawn, softness, seed)

"""Plan a phantom competition from one seed: its patients, studies and images, and its odd or damaged files."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

# Shares in SIIM's training set.
CLASS_SHARES = {"negative": 0.28, "typical": 0.47, "indeterminate": 0.17, "atypical": 0.08}
# Shares of studies with an unannotated near-duplicate image, and with other additional images; most studies have one image.
DUPLICATE_SHARE, SERIES_SHARE = 0.05, 0.03
ODDITIES = ("window width 0", "skull", "padding")
ODDITY_SHARE = 0.01
DAMAGES = ("truncated", "garbage", "empty")


@dataclass(frozen=True)
class PlannedImage:
    """One image of a PlannedStudy. `oddity` is one of ODDITIES or "". `damage` is one of DAMAGES if unreadable, else ""."""

    image_id: str
    series_id: str
    duplicate: bool = False  # whether it is a near-duplicate of the study's first image
    oddity: str = ""
    damage: str = ""


@dataclass(frozen=True)
class PlannedStudy:
    """One study of a phantom competition, before its images are drawn."""

    split: str  # "train" or "test"
    study_id: str
    patient_id: str
    patient_seed: int
    study_class: str
    seed: int
    images: tuple[PlannedImage, ...]


def plan_split(split: str, studies: int, seed: int, damaged: int) -> list[PlannedStudy]:
    """Plan the studies of the split "train" or "test" of a phantom of SIIM's competition. No patient is in both splits.

    `damaged` is the number of images that cannot be read. Raises ValueError if it is more than half of the images.
    """
    rng = np.random.default_rng([seed, ("train", "test").index(split)])
    classes = rng.permutation(apportion(studies, CLASS_SHARES))
    patients = rng.permutation(draw_patient_numbers(studies, rng))
    positive = np.flatnonzero(classes != "negative")
    duplicated = set(rng.choice(positive, max(1, round(DUPLICATE_SHARE * studies)), replace=False))
    others = [index for index in rng.permutation(studies) if index not in duplicated]
    with_more_images = set(others[: max(1, round(SERIES_SHARE * studies))])
    planned = []
    for index in range(studies):
        study_id = _hex_id(seed, split, "study", index)
        count = 1 + (index in duplicated) + (int(rng.integers(1, 3)) if index in with_more_images else 0)
        images = tuple(
            PlannedImage(
                image_id=_hex_id(seed, split, "image", index, position),
                series_id=_hex_id(seed, split, "series", index, position),
                duplicate=index in duplicated and position > 0,
            )
            for position in range(count)
        )
        patient = int(patients[index])
        planned.append(
            PlannedStudy(
                split=split,
                study_id=study_id,
                patient_id=_hex_id(seed, split, "patient", patient),
                patient_seed=int(hashlib.sha256(f"{seed} {split} {patient}".encode()).hexdigest()[:8], 16),
                study_class=str(classes[index]),
                seed=int(rng.integers(2**31)),
                images=images,
            )
        )
    return _with_oddities(planned, damaged, rng)


def _with_oddities(planned: list[PlannedStudy], damaged: int, rng: np.random.Generator) -> list[PlannedStudy]:
    image_indices = [(study, image) for study in range(len(planned)) for image in range(len(planned[study].images))]
    if damaged > len(image_indices) // 2:
        raise ValueError(
            f"damaged_test_files is {damaged}, but the test set has {len(image_indices)} images; at most half may be damaged"
        )
    order = rng.permutation(len(image_indices))
    odd = max(len(ODDITIES), round(ODDITY_SHARE * len(ODDITIES) * len(image_indices)))
    changes = [{"damage": DAMAGES[k % len(DAMAGES)]} for k in range(damaged)]
    changes += [{"oddity": ODDITIES[k % len(ODDITIES)]} for k in range(odd)]
    for position, change in zip(order, changes, strict=False):
        study, image = image_indices[position]
        images = list(planned[study].images)
        images[image] = replace(images[image], **change)
        planned[study] = replace(planned[study], images=tuple(images))
    return planned


def apportion(count: int, shares: dict[str, float]) -> list[str]:
    """Return a list of `count` names, in which each name is repeated in proportion to its share, at least once.

    `shares` maps names to shares, which sum to 1. Rounding is by largest remainder. Equal names are adjacent, in the order
    of `shares`.
    """
    exact = {name: share * count for name, share in shares.items()}
    counts = {name: max(1, int(value)) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: int(exact[name]) - exact[name]):
        if sum(counts.values()) < count:
            counts[name] += 1
    while sum(counts.values()) > count:
        counts[max(counts, key=counts.__getitem__)] -= 1
    return [name for name in shares for _ in range(counts[name])]


def draw_patient_numbers(studies: int, rng: np.random.Generator) -> list[int]:
    """Return random patient numbers, one per study, ascending from 0; studies of one patient have the same number.

    Six patients in ten have one study, the others up to four.
    """
    numbers: list[int] = []
    patient = 0
    while len(numbers) < studies:
        numbers += [patient] * int(rng.choice([1, 2, 3, 4], p=[0.62, 0.2, 0.1, 0.08]))
        patient += 1
    return numbers[:studies]


def _hex_id(*parts: object) -> str:
    """Return a hash of `parts`, twelve hexadecimal digits like the competition's ids."""
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:12]

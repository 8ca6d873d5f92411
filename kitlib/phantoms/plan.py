"""Plans a phantom competition: which patients, studies and images it has, what is odd or broken, all from one seed."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

# Shares in SIIM's training set.
CLASS_SHARES = {"negative": 0.28, "typical": 0.47, "indeterminate": 0.17, "atypical": 0.08}
# A study of one image is the rule; shares of studies with a near-duplicate image that nobody annotated, and with others.
DUPLICATE_SHARE, SERIES_SHARE = 0.05, 0.03
ODDITIES = ("window width 0", "skull", "padding")
ODDITY_SHARE = 0.01
DAMAGES = ("truncated", "garbage", "empty")


@dataclass(frozen=True)
class PlannedImage:
    image_id: str
    series_id: str
    duplicate: bool = False  # of the study's first image
    oddity: str = ""
    damage: str = ""


@dataclass(frozen=True)
class PlannedStudy:
    split: str  # "train" or "test"
    study_id: str
    patient_id: str
    patient_seed: int
    study_class: str
    seed: int
    images: tuple[PlannedImage, ...]


def plan_split(split: str, studies: int, seed: int, damaged: int) -> list[PlannedStudy]:
    """Which studies, images, duplicates, oddities and damages a split holds. No patient is in both splits.

    Raises ValueError where fewer images than `damaged` are left that keep their study readable.
    """
    rng = np.random.default_rng([seed, ("train", "test").index(split)])
    classes = rng.permutation(apportion(studies, CLASS_SHARES))
    patients = rng.permutation(patient_numbers(studies, rng))
    positive = np.flatnonzero(classes != "negative")
    duplicated = set(rng.choice(positive, max(1, round(DUPLICATE_SHARE * studies)), replace=False))
    others = [index for index in rng.permutation(studies) if index not in duplicated]
    several = set(others[: max(1, round(SERIES_SHARE * studies))])
    planned = []
    for index in range(studies):
        study_id = _hex_id(seed, split, "study", index)
        count = 1 + (index in duplicated) + (int(rng.integers(1, 3)) if index in several else 0)
        images = tuple(
            PlannedImage(
                image_id=_hex_id(seed, split, "image", index, place),
                series_id=_hex_id(seed, split, "series", index, place),
                duplicate=index in duplicated and place > 0,
            )
            for place in range(count)
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
    places = [(study, image) for study in range(len(planned)) for image in range(len(planned[study].images))]
    if damaged > len(places) // 2:
        raise ValueError(f"damaged_test_files = {damaged}, but the test set has {len(places)} images: at most half of them")
    order = rng.permutation(len(places))
    odd = max(len(ODDITIES), round(ODDITY_SHARE * len(ODDITIES) * len(places)))
    changes = [{"damage": DAMAGES[k % len(DAMAGES)]} for k in range(damaged)]
    changes += [{"oddity": ODDITIES[k % len(ODDITIES)]} for k in range(odd)]
    for place, change in zip(order, changes, strict=False):
        study, image = places[place]
        images = list(planned[study].images)
        images[image] = replace(images[image], **change)
        planned[study] = replace(planned[study], images=tuple(images))
    return planned


def apportion(count: int, shares: dict[str, float]) -> list[str]:
    """`count` names, in the order of `shares` (which sum to one), by largest remainder and every name at least once."""
    exact = {name: share * count for name, share in shares.items()}
    counts = {name: max(1, int(value)) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: int(exact[name]) - exact[name]):
        if sum(counts.values()) < count:
            counts[name] += 1
    while sum(counts.values()) > count:
        counts[max(counts, key=counts.__getitem__)] -= 1
    return [name for name in shares for _ in range(counts[name])]


def patient_numbers(studies: int, rng: np.random.Generator) -> list[int]:
    """The patient's number of every study, from 0 in order: six patients in ten have one study, others up to four."""
    numbers: list[int] = []
    patient = 0
    while len(numbers) < studies:
        numbers += [patient] * int(rng.choice([1, 2, 3, 4], p=[0.62, 0.2, 0.1, 0.08]))
        patient += 1
    return numbers[:studies]


def _hex_id(*parts: object) -> str:
    """Twelve hexadecimal digits, as the competition's own ids."""
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:12]

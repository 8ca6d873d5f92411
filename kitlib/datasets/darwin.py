"""Reads V7's COVID-19 X-rays from Darwin: frontal images, tags, and lung masks that include the area behind the heart."""

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from kitlib.datasets.base import Dataset, read_headers
from kitlib.datasets.darwin_json import DarwinAnnotation, read_darwin_json
from kitlib.datasets.data_folder import DataFolder, listed_id, read_csv
from kitlib.datasets.faults import Faults
from kitlib.errors import DatasetError, MaskError

# The classes have the same names as the tags. For an image without any of these tags, all classes are unknown.
CLASSES = ("No Pneumonia (healthy)", "Bacterial Pneumonia", "Viral Pneumonia", "COVID-19")
# Matches tags of images that are not frontal X-rays; some are CT slices.
NOT_FRONTAL = re.compile(r"\b(lateral|ct|axial|coronal|sagittal)\b", re.IGNORECASE)
VIEW = re.compile(r"\b(AP|PA)\b")
LEAST_SIDE = 256  # pixels
METADATA = "metadata.csv"  # of ieee8023/covid-chestxray-dataset, from which the COVID-19 images come
# File names of Kermany's data set, from which the other images come; a patient may have several images.
KERMANY_PATIENT = re.compile(r"(person\d+)_(?:bacteria|virus)_\d+|((?:NORMAL2-)?IM-\d+)-\d+", re.IGNORECASE)
HOW_TO_GET = "`darwin dataset pull v7-labs/covid-19-chest-x-ray-dataset:all-images`, see inputs/README.md"
# As stated in the data set's repository, github.com/v7labs/covid-19-xray-dataset.
PUBLISHED = {"images": 6504}


def read_darwin(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the frontal X-rays below `folder` with their labels, views, patients and lung masks.

    Annotations are Darwin's JSON files anywhere below `folder`. An annotation is matched to its image by the image's name in
    Darwin, the image's name in the original source, or the annotation's file name. Masks are the polygons named "lung". If
    an annotation has none, the mask is an image file with the name of the annotation or the image, in a folder with "mask"
    in its name, such as `annotations/all-images-semantic-masks`. `image_id` and `study_id` are the image's file name without
    suffix. Labels have one column for each of four tags (CLASSES), all NaN for images without any of these tags. Patient ids
    come from ieee8023's `metadata.csv` and from Kermany's file names; an image without one counts as a patient of its own.
    An image is left out and recorded in `Dataset.faults` if it has a tag such as "lateral" or "CT" (NOT_FRONTAL), fewer than
    LEAST_SIDE rows or columns, or an unreadable header. An annotation without an image is also left out and recorded. Raises
    DatasetError if there is no image or no mask, or if `metadata.csv` lacks a column.
    """
    source = DataFolder.of(folder)
    folder, faults = source.folder, source.faults

    def is_mask(path: Path) -> bool:
        return any("mask" in name for name in source.folders(path))

    files = source.find_images(is_wanted=lambda path: not is_mask(path))
    mask_files = {name.removesuffix("_mask"): path for name, path in source.find_images(is_wanted=is_mask).items()}
    if not files:
        raise DatasetError(
            f"{folder} holds {len(source.paths)} files, but no PNG or JPEG image outside folders of masks: {HOW_TO_GET}"
        )
    annotations = _read_annotations(source, files, progress)
    headers = dict(zip(files, read_headers([str(path) for path in files.values()], progress), strict=True))
    image_ids, too_small, not_frontal = [], [], []
    for image_id in sorted(files):
        header, image_tags = headers[image_id], annotations[image_id][1].tags if image_id in annotations else ()
        if header.problem:
            faults.add(files[image_id].name, image_id, f"{header.problem}; left out")
        elif any(NOT_FRONTAL.search(tag) for tag in image_tags):
            not_frontal.append(image_id)
        elif min(header.rows, header.columns) < LEAST_SIDE:
            too_small.append(image_id)
        else:
            image_ids.append(image_id)
    faults.add_summary("images", not_frontal, "are not frontal X-rays, according to their tags; left out")
    faults.add_summary("images", too_small, f"have a side below {LEAST_SIDE} pixels; left out")
    faults.add_summary(
        "images",
        [image_id for image_id in image_ids if image_id not in annotations],
        "have no annotation; their view and class are unknown",
    )
    if not image_ids:
        raise DatasetError(f"{folder} contains no frontal X-ray with at least {LEAST_SIDE} pixels a side: {HOW_TO_GET}")
    tags = {image_id: annotations[image_id][1].tags if image_id in annotations else () for image_id in image_ids}
    patients = _find_patients(source.find_table(METADATA), image_ids, annotations, faults)
    images = pd.DataFrame(
        {
            "image_id": image_ids,
            "study_id": image_ids,
            "patient_id": [patients[image_id] for image_id in image_ids],
            "path": [str(files[image_id]) for image_id in image_ids],
            "rows": [headers[image_id].rows for image_id in image_ids],
            "columns": [headers[image_id].columns for image_id in image_ids],
            "source": "darwin",
            "view": [_view(tags[image_id]) for image_id in image_ids],
            "convention": "with_heart",
        }
    )
    masks = _find_masks(folder, image_ids, annotations, mask_files, faults)
    return Dataset.from_tables(source, images, _labels(tags), PUBLISHED, masks=masks)


def _read_annotations(
    source: DataFolder, files: dict[str, Path], progress: bool
) -> dict[str, tuple[Path, DarwinAnnotation]]:
    """Return a dict from image id to the path and the content of its annotation file.

    If an image has several annotation files, the first one is used.
    """
    annotations: dict[str, tuple[Path, DarwinAnnotation]] = {}
    without_image, repeated = [], []
    faults = source.faults
    paths = source.find((".json",))
    for path in tqdm(paths, desc="annotations", unit="file", disable=not progress):
        try:
            annotation = read_darwin_json(path)
        except MaskError as error:
            faults.add(path.name, path.stem, f"{error}; left out")
            continue
        names = (*map(listed_id, annotation.names), listed_id(path.name))
        image_id = next((name for name in names if name in files), None)
        if image_id is None:
            without_image.append(path.stem)
        elif image_id in annotations:
            repeated.append(path.stem)
        else:
            annotations[image_id] = (path, annotation)
    faults.add_summary("annotations", without_image, "are annotations without an image; left out")
    faults.add_summary("annotations", repeated, "annotate an image that already has an annotation; left out")
    return annotations


def _find_masks(
    folder: Path,
    image_ids: list[str],
    annotations: dict[str, tuple[Path, DarwinAnnotation]],
    mask_files: dict[str, Path],
    faults: Faults,
) -> pd.DataFrame:
    rows, unmasked = [], []
    for image_id in image_ids:
        path, annotation = annotations.get(image_id, (None, None))
        if annotation is None or not annotation.has_polygon():
            path = mask_files.get(image_id if path is None else path.stem, mask_files.get(image_id))
        if path is None:
            unmasked.append(image_id)
        else:
            rows.append((image_id, "lungs", str(path)))
    if not rows:
        raise DatasetError(f"{folder} contains no lung mask for its images, neither a polygon nor a file: {HOW_TO_GET}")
    faults.add_summary("images", unmasked, "have no mask")
    return pd.DataFrame(rows, columns=["image_id", "structure", "path"])


def _labels(tags: dict[str, tuple[str, ...]]) -> pd.DataFrame:
    labels = pd.DataFrame(
        [[float(name in image_tags) for name in CLASSES] for image_tags in tags.values()], columns=list(CLASSES)
    )
    labels = labels[labels.any(axis=1)].reindex(labels.index)
    return labels.assign(id=list(tags))


def _find_patients(
    metadata: Path | None, image_ids: list[str], annotations: dict[str, tuple[Path, DarwinAnnotation]], faults: Faults
) -> dict[str, str]:
    """Return a dict from image id to patient id.

    The patient comes from the table `metadata` or from Kermany's file names; an image that is in neither is its own patient.
    """
    ieee_patients: dict[str, str] = {}
    if metadata:
        table = read_csv(metadata, ("patientid", "filename"))
        ieee_patients = {
            listed_id(name): f"ieee8023-{patient}"
            for name, patient in zip(table.filename, table.patientid.str.strip(), strict=True)
            if patient
        }
    else:
        faults.add(METADATA, "", "the file is missing; images of one patient with COVID-19 may fall into several folds")
    patients = {}
    for image_id in image_ids:
        names = [
            image_id,
            *map(listed_id, annotations[image_id][1].names if image_id in annotations else ()),
        ]
        matches = (KERMANY_PATIENT.match(name) for name in names)
        fallback = next((f"kermany-{(match[1] or match[2]).lower()}" for match in matches if match), f"darwin-{image_id}")
        patients[image_id] = next((ieee_patients[name] for name in names if name in ieee_patients), fallback)
    return patients


def _view(tags: Iterable[str]) -> str:
    return next((match[1] for match in map(VIEW.search, tags) if match), "")

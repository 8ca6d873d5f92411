"""Reads V7's COVID-19 X-rays from Darwin: frontal images, their tags, and lungs drawn with what lies behind the heart."""

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from kitlib.datasets.base import Dataset, Faults, files_below, read_csv, read_headers
from kitlib.datasets.darwin_json import DarwinAnnotation, read_darwin_json
from kitlib.errors import DatasetError, MaskError

SUFFIXES = (".png", ".jpg", ".jpeg")
# As its tags have them. An image with none of them is unknown in all.
CLASSES = ("No Pneumonia (healthy)", "Bacterial Pneumonia", "Viral Pneumonia", "COVID-19")
# Tags of what is no frontal X-ray; some of its images are slices of CT.
NOT_FRONTAL = re.compile(r"\b(lateral|ct|axial|coronal|sagittal)\b", re.IGNORECASE)
VIEW = re.compile(r"\b(AP|PA)\b")
LEAST_SIDE = 256  # pixels
METADATA = "metadata.csv"  # of ieee8023/covid-chestxray-dataset, the source of the images of COVID-19
# Names of Kermany's images, the source of the others: a patient may have several.
KERMANY_PATIENT = re.compile(r"(person\d+)_(?:bacteria|virus)_\d+|((?:NORMAL2-)?IM-\d+)-\d+", re.IGNORECASE)
GOT = "`darwin dataset pull v7-labs/covid-19-chest-x-ray-dataset:all-images`, see inputs/README.md"
# Images and masks in its own repository, github.com/v7labs/covid-19-xray-dataset.
PUBLISHED = {"images": 6504}


def read_darwin(folder: str | Path, progress: bool = True) -> Dataset:
    """The images below `folder`, in a folder `images`, with what annotations and masks say of them.

    Annotations are Darwin's JSON files, anywhere below; they name their image by Darwin's name, its source's, or their own.
    Masks are their polygons called lung or, where an annotation has none, an image file called as the annotation or the
    image in a folder whose name has "mask", such as `annotations/all-images-semantic-masks`; without any annotation such
    files alone. image_id and study_id are the image's name without suffix. Labels have the columns CLASSES, NaN where no tag
    says. Patients are told by METADATA and by Kermany's names; who is not, counts as one of his own. Left out, with a fault:
    images with a tag of NOT_FRONTAL, a side below LEAST_SIDE or an unreadable header, and annotations of no image. Raises
    DatasetError where no image or no mask is there, or METADATA has other columns.
    """
    folder, faults = Path(folder), Faults()
    if not (folder / "images").is_dir():
        raise DatasetError(f"{folder / 'images'} is missing: the images belong there, {GOT}")
    files = files_below(folder / "images", SUFFIXES, faults)
    drawn: dict[str, Path] = {}
    for place in sorted(path for path in folder.rglob("*") if "mask" in path.name.lower() and path.is_dir()):
        drawn |= {name.removesuffix("_mask"): path for name, path in files_below(place, SUFFIXES, faults).items()}
    told = _annotations(folder, files, faults, progress)
    headers = dict(zip(files, read_headers([str(path) for path in files.values()], progress), strict=True))
    kept, small, turned = [], [], []
    for image_id in sorted(files):
        header, own_tags = headers[image_id], told[image_id][1].tags if image_id in told else ()
        if header.problem:
            faults.add(files[image_id].name, image_id, f"{header.problem}; left out")
        elif any(NOT_FRONTAL.search(tag) for tag in own_tags):
            turned.append(image_id)
        elif min(header.rows, header.columns) < LEAST_SIDE:
            small.append(image_id)
        else:
            kept.append(image_id)
    faults.count("images", turned, "are no frontal X-rays, as their tags say; left out")
    faults.count("images", small, f"have a side below {LEAST_SIDE} pixels; left out")
    faults.count(
        "images", [image_id for image_id in kept if image_id not in told], "have no annotation; view and class are unknown"
    )
    if not kept:
        raise DatasetError(f"{folder / 'images'} holds no frontal X-ray of {LEAST_SIDE} pixels a side or more: {GOT}")
    tags = {image_id: told[image_id][1].tags if image_id in told else () for image_id in kept}
    patients = _patients(folder / METADATA, kept, told, faults)
    images = pd.DataFrame(
        {
            "image_id": kept,
            "study_id": kept,
            "patient_id": [patients[image_id] for image_id in kept],
            "path": [str(files[image_id]) for image_id in kept],
            "rows": [headers[image_id].rows for image_id in kept],
            "columns": [headers[image_id].columns for image_id in kept],
            "source": "darwin",
            "view": [_view(tags[image_id]) for image_id in kept],
            "convention": "with_heart",
        }
    )
    masks = _masks(folder, kept, told, drawn, faults)
    return Dataset.checked(folder, images, _labels(tags), faults, PUBLISHED, masks=masks)


def _annotations(
    folder: Path, files: dict[str, Path], faults: Faults, progress: bool
) -> dict[str, tuple[Path, DarwinAnnotation]]:
    """Image id -> its annotation and whose file that is; the first counts."""
    told: dict[str, tuple[Path, DarwinAnnotation]] = {}
    strangers, again = [], []
    paths = sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    for path in tqdm(paths, desc="annotations", unit="file", disable=not progress):
        try:
            annotation = read_darwin_json(path)
        except MaskError as error:
            faults.add(path.name, path.stem, f"{error}; left out")
            continue
        names = (*(Path(name).stem for name in annotation.names), path.stem)
        image_id = next((name for name in names if name in files), None)
        if image_id is None:
            strangers.append(path.stem)
        elif image_id in told:
            again.append(path.stem)
        else:
            told[image_id] = (path, annotation)
    faults.count("annotations", strangers, "are annotations of no image; left out")
    faults.count("annotations", again, "are annotations of an image that has one; left out")
    return told


def _masks(
    folder: Path,
    kept: list[str],
    told: dict[str, tuple[Path, DarwinAnnotation]],
    drawn: dict[str, Path],
    faults: Faults,
) -> pd.DataFrame:
    rows, bare = [], []
    for image_id in kept:
        path, annotation = told.get(image_id, (None, None))
        if annotation is None or not annotation.has():
            path = drawn.get(image_id if path is None else path.stem, drawn.get(image_id))
        if path is None:
            bare.append(image_id)
        else:
            rows.append((image_id, "lungs", str(path)))
    if not rows:
        raise DatasetError(f"{folder} holds no annotation with a lung and no mask of one of its images: {GOT}")
    faults.count("images", bare, "have no mask")
    return pd.DataFrame(rows, columns=["image_id", "structure", "path"])


def _labels(tags: dict[str, tuple[str, ...]]) -> pd.DataFrame:
    labels = pd.DataFrame([[float(name in found) for name in CLASSES] for found in tags.values()], columns=list(CLASSES))
    labels = labels[labels.any(axis=1)].reindex(labels.index)
    labels.insert(0, "id", list(tags))
    return labels


def _patients(
    metadata: Path, kept: list[str], told: dict[str, tuple[Path, DarwinAnnotation]], faults: Faults
) -> dict[str, str]:
    """Image id -> patient."""
    known: dict[str, str] = {}
    if metadata.is_file():
        table = read_csv(metadata, ("patientid", "filename"))
        known = {
            Path(name).stem: f"ieee8023-{patient}" for name, patient in zip(table.filename, table.patientid, strict=True)
        }
    else:
        faults.add(metadata.name, "", "the file is missing; images of one patient with COVID-19 may fall into several folds")
    patients = {}
    for image_id in kept:
        names = [image_id, *(Path(name).stem for name in (told[image_id][1].names if image_id in told else ()))]
        matches = (KERMANY_PATIENT.match(name) for name in names)
        kermany = next((f"kermany-{(match[1] or match[2]).lower()}" for match in matches if match), f"darwin-{image_id}")
        patients[image_id] = next((known[name] for name in names if known.get(name)), kermany)
    return patients


def _view(tags: Iterable[str]) -> str:
    return next((match[1] for match in map(VIEW.search, tags) if match), "")

"""`Competition`: all that the kit needs to know of a competition, from the reader of its data to its score.

A competition asks for up to four kinds of answers: classes of studies, classes of images, boxes of one or many classes, and
masks. Ground truth and submissions are values whose type only the competition's own file knows; boxes are in pixels of the
original image, as in kitlib.tables.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd

from kitlib.atomic import write_text
from kitlib.competitions.csv_files import SAMPLE, Rows, find_sample, read_listed
from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.competitions.merged import MergedPredictions
from kitlib.errors import SettingsError, SubmissionError
from kitlib.scoring.validate import Fault
from kitlib.settings import AtLeastOne, Positive, Settings


class Slug:
    """Rule for a text: lower-case words joined by hyphens, as in the address of a competition."""

    def allows(self, value: str) -> bool:
        return all(word.isalnum() and word == word.lower() for word in value.split("-"))

    def __str__(self) -> str:
        return "of lower-case words joined by hyphens"


@dataclass(frozen=True)
class BoxTruth:
    """True boxes: all `image_ids`, each once, and `boxes`: a table with image_id, finding and kitlib.tables.BOX."""

    image_ids: tuple[str, ...]
    boxes: pd.DataFrame


@dataclass(frozen=True)
class Competition(Settings):
    """A competition: its facts, and functions that read and score its files.

    `read_truth` gets the file with the ground truth in the format of the training data, or the folder that contains it.
    `read_submission` gets a file and the ids that it must have, and raises SubmissionError at the first fault. `find_faults`
    gets the ids, the file, and what the ids are from, for messages; it returns every fault and never raises. `metric` is a
    pure function of a ground truth and a submission; its result is keyed by the names of its parts, `score` first, and NaN
    where a part is undefined. `baseline_rows` returns a row of cells for each id, which follow from no image but from the
    frequencies in the training data. Functions that read the ground truth or a sample raise a KitError for a bad file.

    From models to a submission: `dataset` is the reader of the training data (kitlib.datasets.registry). `truth_of` returns
    the ground truth of images, from the tables images, labels and boxes of a prepared run and its masks (or None).
    `settings` is a class whose fields say how merged predictions become answers, and `decide` does it: it returns a
    submission, as `read_submission` does, for the images that any model has predicted. `fill` returns the rows of the
    submission for the given ids, and the ids of those that no model has predicted, which are the rows of the baseline.
    `read_test` lists the test images in a folder. `judge` returns the score of the settings like `metric` after `decide`,
    but faster: its boxes have a further column `match`, the row of the true box with the same finding that they overlap by
    more than `hit_iou`, or -1, and its masks what `compare` adds to them. `helping_classes` are classes of images that
    `decide` uses but no row contains. `side` is the side in pixels of all published images, if they have the same: the
    answers are then in pixels of these, also for resized copies.

    Raises SettingsError for an invalid field, a class that occurs twice, or a competition that wants no answers.
    """

    name: Annotated[str, Slug()]
    slug: Annotated[str, Slug()]  # in the competition's address on Kaggle
    title: str
    header: tuple[str, ...]  # of a submission; the first column has the ids
    read_truth: Callable[[Path], Any]
    truth_ids: Callable[[Any], Iterable[str]]
    read_sample: Callable[[Path], Iterable[str]]
    read_submission: Callable[[Path, list[str]], Any]
    find_faults: Callable[[list[str], Path, str], list[Fault]]
    metric: Callable[[Any, Any], dict[str, float]]
    baseline_rows: Callable[[list[str]], list[list[str]]]
    dataset: str
    settings: Any  # a class derived from FusionSettings
    truth_of: Callable[[pd.DataFrame, pd.DataFrame, pd.DataFrame, Any], Any]
    decide: Callable[[MergedPredictions, Any], Any]
    fill: Callable[[list[str], Any], tuple[list[list[str]], list[str]]]
    read_test: Callable[[Path], Any]
    judge: Callable[[Any, MergedPredictions, Any], float] | None = None
    compare: Callable[[Any, pd.DataFrame], pd.DataFrame] | None = None
    hit_iou: Positive = 0.5
    sample: str = SAMPLE  # name of the sample submission on Kaggle
    helping_classes: tuple[str, ...] = ()
    side: AtLeastOne | None = None
    time_limit_hours: Positive | None = None  # of the notebook that submits; None: a file is uploaded
    study_classes: tuple[str, ...] = ()  # exclude each other
    image_classes: tuple[str, ...] = ()
    box_classes: tuple[str, ...] = ()
    mask_classes: tuple[str, ...] = ()

    @classmethod
    def with_rows(cls, rows: Rows[Any], **fields: Any) -> "Competition":
        """Return a competition whose submissions have `rows`, one for each test image; `fields` are its other fields."""
        fields |= {"header": rows.header, "sample": rows.sample, "read_sample": rows.read_sample}
        return cls(find_faults=rows.find_faults, read_test=read_listed(rows), **fields)

    def __post_init__(self) -> None:
        super().__post_init__()
        answers = self.answers
        if not answers:
            raise SettingsError(
                f"{self.name} wants no answers; set study_classes, image_classes, box_classes or mask_classes"
            )
        for kind, classes in answers.items():
            if len(set(classes)) < len(classes):
                raise SettingsError(f"{kind} of {self.name} has a class twice: {', '.join(classes)}")

    @property
    def answers(self) -> dict[str, tuple[str, ...]]:
        """The classes of each kind of answer that the competition wants, by the name of the field."""
        kinds = ("study_classes", "image_classes", "box_classes", "mask_classes")
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind)}

    @property
    def is_notebook(self) -> bool:
        """Whether a notebook submits, which Kaggle runs offline on the hidden test set; otherwise a file is uploaded."""
        return self.time_limit_hours is not None

    def judged(self, truth: Any, merged: MergedPredictions, settings: FusionSettings) -> float:
        """Return the score of merged predictions with these settings against the ground truth of the same images."""
        if self.judge is not None:
            return self.judge(truth, merged, settings)
        return self.metric(truth, self.decide(merged, settings))["score"]

    def write(self, path: str | Path, ids: Iterable[str], decided: Any) -> list[str]:
        """Write a submission with a row for each id, atomically; return the ids whose rows are the baseline's.

        `decided` is what `decide` returns, or None: then all rows are the baseline's.
        """
        ids = list(ids)
        rows, without = (self.baseline_rows(ids), ids) if decided is None else self.fill(ids, decided)
        write_text(path, "".join(f"{','.join(cells)}\n" for cells in [self.header, *rows]))
        return without

    def score_files(self, truth: str | Path, submission: str | Path) -> dict[str, float]:
        """Return the score of a submission file and its parts, by name; for the values see `metric`.

        Raises a KitError if a file cannot be read, and SubmissionError or ScoringError if the submission has a fault.
        """
        known = self.read_truth(Path(truth))
        return self.metric(known, self.read_submission(Path(submission), list(self.truth_ids(known))))

    def validate_file(
        self, submission: str | Path, sample: str | Path | None = None, truth: str | Path | None = None
    ) -> list[Fault]:
        """Return every fault of a submission file, whose ids must be those of the `sample` submission or of the `truth`.

        Raises ValueError unless exactly one of `sample` and `truth` is given, and a KitError if it cannot be read.
        """
        if sample is not None and truth is None:
            ids, source = self.read_sample(Path(sample)), "the sample submission"
        elif truth is not None and sample is None:
            ids, source = self.truth_ids(self.read_truth(Path(truth))), "the ground truth"
        else:
            raise ValueError("either `sample` or `truth` is required, but not both")
        return self.find_faults(list(ids), Path(submission), source)

    def tables(self, decided: Any) -> dict[str, pd.DataFrame]:
        """Return what `decide` returns as tables, by name; none unless it consists of several tables, as SIIM's does."""
        return dict(vars(decided)) if is_dataclass(decided) else {}

    def write_first(self, folder: str | Path, path: str | Path) -> int:
        """Write the trivial baseline for the sample submission in a folder of data; return the number of rows.

        Nothing is written, and 0 returned, if the sample is missing or cannot be read.
        """
        try:
            return self.write_baseline(find_sample(folder, self.sample), path)
        except SubmissionError:
            return 0

    def write_baseline(self, sample: str | Path, path: str | Path) -> int:
        """Write the trivial baseline for the ids of a sample submission, atomically; return the number of rows.

        Raises SubmissionError if the sample cannot be read or has no rows.
        """
        ids = list(self.read_sample(Path(sample)))
        if not ids:
            raise SubmissionError(f"{sample} has no rows; copy the competition's file again")
        return len(self.write(path, ids, None))


def fill_rows(baseline: list[list[str]], answers: Mapping[str, list[str]]) -> tuple[list[list[str]], list[str]]:
    """Return rows of cells, and the ids of those that are the baseline's because `answers` lacks them.

    `baseline` has the rows of all ids; `answers` maps an id to the cells after it.
    """
    rows = [[name, *answers[name]] if name in answers else [name, *cells] for name, *cells in baseline]
    return rows, [name for name, *_ in baseline if name not in answers]

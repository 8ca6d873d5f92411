"""`Competition`: everything that the kit needs to know about a competition, from reading its data to computing its score.

A competition asks for up to four kinds of answers: classes of studies, classes of images, boxes of one or many classes, and
masks. Each competition's own file chooses the types of its ground truth and submissions. Boxes are in pixels of the original
image, as in kitlib.tables.
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
    """Rule that allows a string only if it is lower-case words joined by hyphens, as in a competition's Kaggle address."""

    def allows(self, value: str) -> bool:
        return all(word.isalnum() and word == word.lower() for word in value.split("-"))

    def __str__(self) -> str:
        return "of lower-case words joined by hyphens"


@dataclass(frozen=True)
class BoxTruth:
    """Ground truth of boxes: the ids of all images, each once, and a table of boxes in original pixels.

    `boxes` has one row per box, with the columns image_id, finding, xmin, ymin, xmax and ymax.
    """

    image_ids: tuple[str, ...]
    boxes: pd.DataFrame


@dataclass(frozen=True)
class Competition(Settings):
    """What the kit needs to know about one competition: facts, and functions that read, score and write its files.

    `read_truth` returns the ground truth, read from a file in the format of the training data, or from the folder of this
    file. `truth_ids` gets a ground truth and returns the ids that a submission must have. `read_sample` returns the ids in a
    sample submission. `read_truth` and `read_sample` raise a KitError if the file is invalid or empty. `read_submission`
    gets a file and the ids that it must have; it raises SubmissionError if the file has a fault. `find_faults` gets the ids
    that a file must have, the file, and a text that says where these ids are from; it returns every fault and never raises.
    `metric` is a pure function of a ground truth and a submission; it returns a dict with `score` first, then its parts by
    name. An undefined value is NaN. `baseline_rows` returns a row of cells for each id. The cells depend only on the id and
    on frequencies in the training data.

    `dataset` is the code that reads the training data, as a key of kitlib.datasets.registry.READERS. `truth_of` returns the
    ground truth of given images; its arguments are the tables `images`, `labels` and `boxes` of a prepared run, and the
    run's masks or None. `settings` is the class of the settings that `decide` gets: FusionSettings or a subclass. `decide`
    turns merged predictions into answers for the images that at least one model has predicted. Without `judge`, answers have
    the type that `read_submission` returns. `fill` gets the ids of a submission and the answers. It returns one row per id,
    and the ids without a prediction, which get the baseline's rows. `read_test` lists the test images in a folder.
    `helping_classes` are classes of images that `decide` uses, but no submission contains. If all published images are
    squares of the same size, `side` is their side length in pixels; otherwise `side` is None. If `side` is given, answers
    are in pixels of the published images, even if the images were reduced in preparation.

    `judge` and `compare` are optional and speed up tuning. `judge` gets a ground truth, merged predictions and settings, and
    returns the score that `metric` gives for the answers of `decide`. The table `boxes` that `judge` gets has the additional
    column `match`: the row of the true box with the same finding and the largest IoU, or -1 if no IoU is above `hit_iou`.
    The table `masks` that `judge` gets has the column that `compare` adds.

    Raises SettingsError for an invalid field, a class that occurs twice, or a competition without classes.
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
    settings: Any  # FusionSettings or a subclass
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
        """Return a competition whose submissions have one row per test image, in the format `rows`.

        `fields` are the other fields of the competition.
        """
        fields |= {"header": rows.header, "sample": rows.sample, "read_sample": rows.read_sample}
        return cls(find_faults=rows.find_faults, read_test=read_listed(rows), **fields)

    def __post_init__(self) -> None:
        super().__post_init__()
        answers = self.answers
        if not answers:
            raise SettingsError(f"{self.name} has no classes; set study_classes, image_classes, box_classes or mask_classes")
        for kind, classes in answers.items():
            if len(set(classes)) < len(classes):
                raise SettingsError(f"{kind} of {self.name} contains {max(classes, key=classes.count)!r} more than once")

    @property
    def answers(self) -> dict[str, tuple[str, ...]]:
        """Dict of the fields `study_classes`, `image_classes`, `box_classes` and `mask_classes`, without empty fields."""
        kinds = ("study_classes", "image_classes", "box_classes", "mask_classes")
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind)}

    @property
    def is_notebook(self) -> bool:
        """Whether a submission is a notebook, which Kaggle runs offline on the hidden test set, and not an uploaded file."""
        return self.time_limit_hours is not None

    def judged(self, truth: Any, merged: MergedPredictions, settings: FusionSettings) -> float:
        """Return the score of the answers that `decide` returns; `truth` and `merged` are for the same images."""
        if self.judge is not None:
            return self.judge(truth, merged, settings)
        return self.metric(truth, self.decide(merged, settings))["score"]

    def write(self, path: str | Path, ids: Iterable[str], decided: Any) -> list[str]:
        """Write a submission file with one row per id, atomically; return the ids whose rows are the baseline submission's.

        `decided` is the result of `decide`, or None to write the baseline submission.
        """
        ids = list(ids)
        rows, without = (self.baseline_rows(ids), ids) if decided is None else self.fill(ids, decided)
        write_text(path, "".join(f"{','.join(cells)}\n" for cells in [self.header, *rows]))
        return without

    def score_files(self, truth: str | Path, submission: str | Path) -> dict[str, float]:
        """Score a submission file against the ground truth in the file or folder `truth`; return the result of `metric`.

        Raises a KitError if a file cannot be read, and SubmissionError or ScoringError if the submission has a fault.
        """
        known = self.read_truth(Path(truth))
        return self.metric(known, self.read_submission(Path(submission), list(self.truth_ids(known))))

    def validate_file(
        self, submission: str | Path, sample: str | Path | None = None, truth: str | Path | None = None
    ) -> list[Fault]:
        """Return every fault of a submission file; its ids must be those of the sample submission or of the ground truth.

        Raises ValueError unless exactly one of `sample` and `truth` is given, and a KitError if that one cannot be read.
        """
        if sample is not None and truth is None:
            ids, source = self.read_sample(Path(sample)), "the sample submission"
        elif truth is not None and sample is None:
            ids, source = self.truth_ids(self.read_truth(Path(truth))), "the ground truth"
        else:
            raise ValueError("either `sample` or `truth` is required, but not both")
        return self.find_faults(list(ids), Path(submission), source)

    def tables(self, decided: Any) -> dict[str, pd.DataFrame]:
        """Return the tables in `decided`, the result of `decide`, by name; {} if `decided` is not a dataclass."""
        return dict(vars(decided)) if is_dataclass(decided) else {}

    def write_first(self, folder: str | Path, path: str | Path) -> int:
        """Write the baseline submission for the ids in a data folder's sample submission; return the number of rows.

        If the sample is missing or cannot be read, this function writes nothing and returns 0.
        """
        try:
            return self.write_baseline(find_sample(folder, self.sample), path)
        except SubmissionError:
            return 0

    def write_baseline(self, sample: str | Path, path: str | Path) -> int:
        """Write the baseline submission for the ids of a sample submission, atomically; return the number of rows.

        Raises SubmissionError if the sample cannot be read or has no rows.
        """
        return len(self.write(path, self.read_sample(Path(sample)), None))


def fill_rows(baseline: list[list[str]], answers: Mapping[str, list[str]]) -> tuple[list[list[str]], list[str]]:
    """Replace the rows of `baseline` for which there are answers; return all rows, and the ids without an answer.

    `baseline` has one row per id: a list of cells that begins with the id. `answers` maps an id to the cells after the id.
    """
    rows = [[name, *answers[name]] if name in answers else [name, *cells] for name, *cells in baseline]
    return rows, [name for name, *_ in baseline if name not in answers]

"""How well exclusive classes are told apart: confusion, figures a class and their means, calibration, failures by class.

Everything is of one model's answers, a row an image, to images of which exactly one class is true. The class that is called
is the most probable one, the first of equals. "Sensitivity" is what the papers also call recall, and "ppv" their precision.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from kitlib.lungs.finders import FOUND
from kitlib.reports.findings_report import Answers, answers, mean_over_folds
from kitlib.scoring.metrics import roc_auc
from kitlib.scoring.temperature import LEAST, cross_scaled
from kitlib.tables import check_table, class_columns

COUNTED = ("accuracy", "sensitivity", "specificity", "ppv", "npv", "f1")
FIGURES = (*COUNTED, "roc_auc", "pr_auc", "brier")
CALIBRATION = ("ece", "brier", "log_loss")
ECE_BINS = 15  # Guo et al. 2017
# Rows of exclusive probabilities may be this far from 1: they were computed in single precision and averaged.
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Judged:
    """Answers of one model to n images, of each of which one class is true."""

    answers: Answers
    image_id: np.ndarray  # (n,)
    source: np.ndarray  # (n,), the data set an image is from
    truth: np.ndarray  # (n,), place of the true class

    @property
    def classes(self) -> tuple[str, ...]:
        return self.answers.classes

    @property
    def found(self) -> np.ndarray:
        """Probabilities (n, classes)."""
        return self.answers.found

    @property
    def called(self) -> np.ndarray:
        """(n,), place of the most probable class."""
        return self.found.argmax(axis=1)

    def rows(self, chosen: np.ndarray) -> "Judged":
        """The images of a bool mask (n,) or of places, in their order."""
        a = self.answers
        kept = Answers(a.classes, a.truth[chosen], a.found[chosen], a.fold[chosen], a.patient[chosen])
        return Judged(kept, self.image_id[chosen], self.source[chosen], self.truth[chosen])


def judged(scores: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame, source: str = "") -> Judged:
    """The rows of `scores` (class_scores of one model) beside their truth; `source`: images of this one alone.

    An image that several folds' models have scored has the mean of their probabilities. Raises ValueError where several
    models are in the table, a class of the labels is not scored, the truth is not exactly one class, or probabilities do
    not sum to 1.
    """
    scores, labels = check_table(scores, "class_scores"), check_table(labels, "labels")
    if scores.empty:
        raise ValueError("there are no scores to judge")
    models = sorted(set(scores.model))
    if len(models) > 1:
        raise ValueError(f"scores are of the models {models}, wanted one: by_model parts them")
    absent = [name for name in class_columns(labels, "labels") if name not in scores]
    if absent:
        raise ValueError(f"scores lack the classes {absent} of the labels: what is one of them cannot be called")
    if scores.image_id.duplicated().any():
        scores = mean_over_folds(scores)
    known = images.set_index("image_id")
    if source:
        there = sorted(set(known.source))
        scores = scores[scores.image_id.map(known.source) == source]
        if scores.empty:
            raise ValueError(f"no scored image is from source {source!r}; there are: {', '.join(there)}")
    given = answers(scores, images, labels)
    ids = scores.image_id.to_numpy()
    wrong = np.flatnonzero(np.isnan(given.truth).any(axis=1) | (np.nansum(given.truth, axis=1) != 1))
    if len(wrong):
        raise ValueError(f"{len(wrong)} images have not exactly one true class, first {ids[wrong[0]]}")
    sums = given.found.sum(axis=1)
    off = np.flatnonzero(np.abs(sums - 1) > SUM_TOLERANCE)
    if len(off):
        raise ValueError(
            f"probabilities of {len(off)} images do not sum to 1, first {ids[off[0]]} with {sums[off[0]]:.4f}: is the model "
            "one of several findings an image (multi_label)?"
        )
    return Judged(given, ids, known.source.reindex(ids).to_numpy(), given.truth.argmax(axis=1))


def by_model(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A table class_scores of several models, one by one, in their order."""
    return {str(name): rows.reset_index(drop=True) for name, rows in scores.groupby("model", sort=False)}


def on_shared_images(given: Mapping[str, Judged]) -> dict[str, Judged]:
    """Each model's answers to the images that all have answered, in one order.

    Raises ValueError where no image is shared, or classes differ.
    """
    if len({each.classes for each in given.values()}) > 1:
        told = "; ".join(f"{name}: {', '.join(each.classes)}" for name, each in given.items())
        raise ValueError(f"models answer different classes, or in different orders, and do not compare ({told})")
    shared = sorted(set.intersection(*(set(each.image_id) for each in given.values()))) if given else []
    if not shared:
        raise ValueError(f"no image is answered by all of {', '.join(given) or 'no models'}")
    return {name: each.rows(pd.Index(each.image_id).get_indexer(shared)) for name, each in given.items()}


def confusion(given: Judged) -> pd.DataFrame:
    """Images by true class (rows) and called class (columns), int."""
    size = len(given.classes)
    counts = np.bincount(given.truth * size + given.called, minlength=size * size).reshape(size, size)
    return pd.DataFrame(counts, index=pd.Index(given.classes, name="truth"), columns=pd.Index(given.classes, name="called"))


def counted_figures(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """COUNTED figures (..., classes), each class against the rest, of confusion matrices (..., truth, called).

    NaN for a class without an image, in all but accuracy, and specificity's where there is no other. Where a class is never
    called its ppv is 0, and where it is always called its npv.
    """
    matrix = np.asarray(matrix, dtype=float)
    hits, of_class, calls = np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(axis=-1), matrix.sum(axis=-2)
    total = of_class.sum(axis=-1, keepdims=True)
    rejected = total - of_class - calls + hits
    nan = np.where(of_class > 0, 0.0, np.nan)
    return {
        "accuracy": _ratio(hits + rejected, total),
        "sensitivity": _ratio(hits, of_class),
        "specificity": _ratio(rejected, total - of_class) + nan,
        "ppv": _ratio(hits, calls, 0.0) + nan,
        "npv": _ratio(rejected, total - calls, 0.0) + nan,
        "f1": _ratio(2 * hits, of_class + calls) + nan,
    }


def class_table(given: Judged) -> pd.DataFrame:
    """A row a class, `class` first, with support and FIGURES, each against the rest, then `macro`: their means over classes
    that occur. pr_auc is average precision; brier the mean squared error of that class's probability."""
    truth = np.arange(len(given.classes)) == given.truth[:, None]
    columns = counted_figures(confusion(given).to_numpy())
    support = truth.sum(axis=0)
    both = [0 < count < len(truth) for count in support]
    pairs = list(zip(given.found.T, truth.T, both, strict=True))
    columns["roc_auc"] = np.array([roc_auc(found, true) if defined else np.nan for found, true, defined in pairs])
    areas = [average_precision_score(true, found) if true.any() else np.nan for found, true, _ in pairs]
    columns |= {"pr_auc": np.array(areas), "brier": ((given.found - truth) ** 2).mean(axis=0)}
    table = pd.DataFrame({"class": given.classes, "support": support, **columns})
    occur = table[table.support > 0]
    return pd.concat([table, pd.DataFrame([{"class": "macro", "support": len(truth), **occur[list(FIGURES)].mean()}])])[
        ["class", "support", *FIGURES]
    ].reset_index(drop=True)


def overall(given: Judged) -> dict[str, float]:
    """accuracy, micro_f1 (for exclusive classes the same), papers_micro_f1, ece, brier, log_loss.

    papers_micro_f1 is what the FLANNEL papers call micro-F1: the harmonic mean of macro precision and macro recall. brier
    is the squared error summed over the classes (0..2, Brier 1950); log_loss is in nats, as `log_losses` has it.
    """
    figures = counted_figures(confusion(given).to_numpy())
    precision, recall = np.nanmean(figures["ppv"]), np.nanmean(figures["sensitivity"])
    right = float((given.called == given.truth).mean())
    truth = np.arange(len(given.classes)) == given.truth[:, None]
    return {
        "accuracy": right,
        "micro_f1": right,
        "papers_micro_f1": float(_ratio(2 * precision * recall, precision + recall, 0.0)),
        "ece": ece(given.found, given.truth),
        "brier": float(((given.found - truth) ** 2).sum(axis=1).mean()),
        "log_loss": float(log_losses(given.found, given.truth).mean()),
    }


def log_losses(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """-log of the true class's probability (n,), nats, of probabilities (n, classes) and true places (n,).

    A probability of 0, as votes give it, costs 16 nats: that of LEAST, which temperatures are fitted with as well.
    """
    return -np.log(np.maximum(found[np.arange(len(truth)), truth], LEAST))


def confidence_bins(found: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """Bin (n,) of each image's highest probability: `bins` of equal width over 0..1, the upper edge in its bin."""
    return np.clip(np.ceil(found.max(axis=1) * bins).astype(int) - 1, 0, bins - 1)


def ece(found: np.ndarray, truth: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the called class, 0..1: |share right - mean confidence| of each bin, weighted by images.

    Guo et al. 2017, equation 3.
    """
    gaps = (found.argmax(axis=1) == truth) - found.max(axis=1)
    return float(np.abs(np.bincount(confidence_bins(found, bins), gaps)).sum() / len(truth))


def at_prevalence(given: Judged, prevalences: Iterable[float]) -> pd.DataFrame:
    """Each class's ppv and npv where its share among patients is `prevalence` (0..1) and the rest is mixed as here.

    By Bayes, of the sensitivity and specificity here: those of a data set with half COVID-19 hold nowhere else.
    """
    figures, rows = counted_figures(confusion(given).to_numpy()), []
    for prevalence in prevalences:
        if not 0 < prevalence < 1:
            raise ValueError(f"a prevalence is {prevalence}, wanted above 0 and below 1, e.g. 0.05")
        for name, hit, kept in zip(given.classes, figures["sensitivity"], figures["specificity"], strict=True):
            ppv = _ratio(hit * prevalence, hit * prevalence + (1 - kept) * (1 - prevalence))
            npv = _ratio(kept * (1 - prevalence), kept * (1 - prevalence) + (1 - hit) * prevalence)
            rows.append({"class": name, "prevalence": prevalence, "ppv": float(ppv), "npv": float(npv)})
    return pd.DataFrame(rows)


def source_table(given: Judged) -> pd.DataFrame:
    """`class_table` of all sources pooled, then within each: what a pooled figure owes to knowing the source falls away.

    Within a source of one class alone nothing is told apart: specificity and areas are NaN there. No macro rows.
    """
    parts = {"pooled": given} | {str(name): given.rows(given.source == name) for name in sorted(set(given.source))}
    tables = [class_table(part).assign(source=name, of=len(part.truth)) for name, part in parts.items()]
    table = pd.concat(tables, ignore_index=True)
    return table[(table["class"] != "macro") & (table.support > 0)][["source", "class", "support", "of", *FIGURES]]


def failures(
    scores: pd.DataFrame,
    images: pd.DataFrame,
    labels: pd.DataFrame,
    folds: pd.DataFrame,
    lungs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """A row a class: its images, and what became of them.

    They are `outside_folds` (excluded, or put aside for a test), `unanswered` (in a fold, no score) or `answered`; of a
    table `lungs`, `lungs_not_found` are in folds too; the last columns are shares of the images in folds. Images that fail
    more often in one class than in another make the figures of the rest look better than they are.
    """
    classes = class_columns(labels, "labels")
    truth = labels.set_index("id")[classes].reindex(images.study_id).to_numpy() >= 0.5
    in_folds, scored = images.image_id.isin(folds["id"]).to_numpy(), images.image_id.isin(scores.image_id).to_numpy()
    marks = {"outside_folds": ~in_folds, "unanswered": in_folds & ~scored, "answered": in_folds & scored}
    if lungs is not None:
        missed = images.image_id.isin(lungs.image_id[lungs.verdict != FOUND]).to_numpy()
        marks["lungs_not_found"] = in_folds & missed
    counts = {name: (truth & mark[:, None]).sum(axis=0) for name, mark in marks.items()}
    within = counts["unanswered"] + counts["answered"]
    shares = {f"{name}_share": _ratio(counts[name], within) for name in ("unanswered", "lungs_not_found") if name in counts}
    return pd.DataFrame({"class": classes, "images": truth.sum(axis=0), **counts, **shares})


def _ratio(above: np.ndarray, below: np.ndarray, where_none: float = np.nan) -> np.ndarray:
    """above / below, `where_none` where below is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, dtype=float), np.asarray(below, dtype=float))
    return np.divide(above, below, out=np.full(above.shape, where_none), where=below > 0)


def calibrated(given: Judged) -> tuple[Judged, pd.Series]:
    """The same images with each fold's probabilities scaled by the temperature of the other folds; temperatures by fold.

    Which class is called does not change. Raises ValueError for images of one fold alone.
    """
    scores = pd.DataFrame(given.found, columns=list(given.classes)).assign(fold=given.answers.fold)
    after, temperatures = cross_scaled(scores, given.classes, given.truth)
    found = after[list(given.classes)].to_numpy(float)
    return replace(given, answers=replace(given.answers, found=found)), temperatures


def calibration_table(given: Mapping[str, Judged]) -> pd.DataFrame:
    """A row a model: ece, brier and log_loss, each `before` and `after` scaling, and the mean `temperature` of its folds."""
    rows = {}
    for name, each in given.items():
        after, temperatures = calibrated(each)
        parts = {"before": overall(each), "after": overall(after)}
        rows[name] = {f"{figure} {when}": told[figure] for figure in CALIBRATION for when, told in parts.items()}
        rows[name]["temperature"] = temperatures.mean()
    return pd.DataFrame.from_dict(rows, orient="index")

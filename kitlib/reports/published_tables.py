"""The documents' tables of classification figures as data, and ours under them with what differs in data and protocol.

Columns are named as `kitlib.reports.classification_bootstrap.draws` names its own, "f1 COVID-19" or "accuracy", all as
shares 0..1. A published figure that cannot be what it is called (see kitlib.reports.reported_counts) stands as printed, and
`faults` says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kitlib.reports.classification_bootstrap import intervals
from kitlib.reports.classification_report import Judged
from kitlib.reports.reported_counts import check_table


@dataclass(frozen=True)
class PublishedTable:
    """One table: `rows` has a row a model, NaN where nothing is printed; `spread` the standard deviations, if any."""

    title: str  # document and number
    rows: pd.DataFrame
    data: str  # what was tested, how many images of which class
    protocol: str  # how it was split, chosen and averaged
    faults: str  # why a figure may not mean what it says; empty: nothing known
    spread: pd.DataFrame | None = None
    counts: tuple[int, int] | None = None  # positives and negatives behind each row, where the rows are single tests


def _percent(columns: tuple[str, ...], rows: dict[str, tuple[float, ...]]) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(columns))
    return (table / 100).round(6)


_F1 = ("f1 COVID-19", "f1 viral", "f1 bacterial", "f1 normal", "f1 macro")
_CHILDREN = (
    "Viral, bacterial and normal images are nearly all Kermany's children, COVID-19 images adults of another source: the "
    "label is nearly the source and the age. Images, not patients, were split. Learners' answers to their own training "
    "images taught the ensemble."
)
_FLANNEL_DATA = "1,283 test images: 100 COVID-19, 339 viral, 531 bacterial, 313 normal (Table 2; ieee8023 and Kermany)"
_FLANNEL_PROTOCOL = (
    "one test set of a fifth of all images, the same for the five rounds in which training and validation rotate; mean over "
    "the rounds"
)
# Table 3: value and, in its brackets, standard deviation of F1 for COVID-19, viral, bacterial, normal and the macro mean.
_GLOBAL = {
    "densenet161": ((0.7694, 0.5901, 0.8030, 0.8875, 0.7625), (0.03, 0.05, 0.01, 0.02, 0.02)),
    "inception_v3": ((0.8938, 0.6413, 0.8112, 0.9015, 0.8120), (0.01, 0.03, 0.02, 0.03, 0.02)),
    "resnet152": ((0.8302, 0.6218, 0.8046, 0.9080, 0.7911), (0.02, 0.02, 0.01, 0.00, 0.01)),
    "resnext101_32x8d": ((0.8197, 0.6151, 0.8016, 0.9046, 0.7852), (0.03, 0.04, 0.01, 0.01, 0.02)),
    "vgg19_bn": ((0.8753, 0.6023, 0.8016, 0.8950, 0.7936), (0.02, 0.01, 0.01, 0.00, 0.00)),
    "FLANNEL": ((0.9239, 0.6675, 0.8306, 0.9322, 0.8385), (0.01, 0.02, 0.01, 0.00, 0.01)),
    "FLANNEL, old data": ((0.8168, 0.6063, 0.8267, 0.9144, 0.7910), (0.03, 0.02, 0.00, 0.01, 0.01)),
}
_PATCHED = {
    "densenet161": ((0.8994, 0.5815, 0.8171, 0.9195, 0.8043), (0.02, 0.02, 0.01, 0.01, 0.01)),
    "inception_v3": ((0.8974, 0.6161, 0.8286, 0.9351, 0.8193), (0.03, 0.00, 0.00, 0.01, 0.01)),
    "resnet152": ((0.8738, 0.5527, 0.8204, 0.9133, 0.7901), (0.02, 0.03, 0.00, 0.00, 0.01)),
    "resnext101_32x8d": ((0.8978, 0.5875, 0.8215, 0.9200, 0.8067), (0.01, 0.01, 0.01, 0.01, 0.00)),
    "vgg19_bn": ((0.8870, 0.5786, 0.8201, 0.9159, 0.8004), (0.03, 0.03, 0.00, 0.01, 0.01)),
    "FLANNEL": ((0.9121, 0.6009, 0.8270, 0.9319, 0.8180), (0.02, 0.01, 0.01, 0.01, 0.01)),
}


def _flannel(part: str, told: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]) -> PublishedTable:
    values, spread = (
        pd.DataFrame.from_dict({name: pair[place] for name, pair in told.items()}, orient="index", columns=list(_F1))
        for place in (0, 1)
    )
    return PublishedTable(f"Patched FLANNEL, Table 3, {part}", values, _FLANNEL_DATA, _FLANNEL_PROTOCOL, _CHILDREN, spread)


_HRNET = ("accuracy", "sensitivity COVID-19", "specificity COVID-19")
_HRNET_DATA = (
    "410 COVID-19 images of ieee8023 and 500 others of NIH and CheXpert, 41 and 50 a fold; 62 of 472 COVID-19 images were "
    "left out for their lungs' mask"
)
_HRNET_PROTOCOL = "10 folds of images; epoch and settings chosen while watching them"
_NPV = (
    "In folds 1, 3, 4, 8 and 10 and for EfficientNet-B4 no counts give the printed specificity: it is the NPV, and the "
    "accuracy, but for fold 10, the mean of sensitivity and specificity. Pooled, the folds have sensitivity 404/410, "
    "specificity 500/500, accuracy 904/910. Each class is from other sources: the label is the source."
)
_MISSED, _RIGHT = (98.78, 97.56, 98.03), (100.0, 100.0, 100.0)
_FOLDS = (_MISSED, _RIGHT, _MISSED, _MISSED, _RIGHT, _RIGHT, _RIGHT, _MISSED, _RIGHT, (97.80, 95.12, 96.15))
_PROSE = "The paper's text states these alone; the cells of its Tables 8 to 11 are not among them."

TABLES = {
    "flannel": _flannel("original FLANNEL", _GLOBAL),
    "patched_flannel": _flannel("patched FLANNEL", _PATCHED),
    "hrnet_folds": PublishedTable(
        "UNet + HRNet, Table 6",
        _percent(
            _HRNET, {f"fold {place}": row for place, row in enumerate(_FOLDS, start=1)} | {"mean": (99.29, 98.53, 98.82)}
        ),
        _HRNET_DATA,
        _HRNET_PROTOCOL,
        _NPV,
        counts=(41, 50),
    ),
    "hrnet": PublishedTable(
        "UNet + HRNet, Table 7",
        _percent(
            _HRNET,
            {
                "resnet152": (94.50, 95.12, 94.00),
                "densenet121": (93.40, 90.24, 96.00),
                "efficientnet_b4": (97.56, 95.12, 96.15),
                "hrnet (mean of the folds)": (99.26, 98.53, 98.82),
            },
        ),
        _HRNET_DATA,
        f"{_HRNET_PROTOCOL}; the baselines are of one fold, their best",
        _NPV,
        counts=(41, 50),
    ),
    "ensemble_three": PublishedTable(
        "ResUNet + ensembles, section 4.1 and Table 6, three classes",
        _percent(
            ("accuracy", "sensitivity COVID-19"),
            {
                "densenet201": (82.42, np.nan),
                "resnet152": (81.84, np.nan),
                "vgg19": (77.53, np.nan),
                "weighted average": (84.07, np.nan),
                "majority vote": (84.00, 82.0),
            },
        ),
        "a tenth of 4,013 COVID-19, 8,066 normal and 5,445 pneumonia images of COVIDx5, RICORD and BIMCV",
        "80/10/10 by patient; COVID-19 images of BIMCV in training alone, of COVIDx5 in validation and test alone",
        f"{_PROSE} The weights' choice and the epochs' are of the validation set, whose figures are 2 to 4 points higher, "
        "but for DenseNet201.",
    ),
    "ensemble_two": PublishedTable(
        "ResUNet + ensembles, abstract and section 5, two classes",
        _percent(("accuracy", "sensitivity COVID-19"), {"weighted average": (91.0, 92.0)}),
        "a tenth of COVID-19 and other images of COVIDx5, RICORD and BIMCV",
        "80/10/10 by patient; COVID-19 images of BIMCV in training alone, of COVIDx5 in validation and test alone",
        _PROSE,
    ),
    "covidgr": PublishedTable(
        "ResUNet + ensembles, Table 12, COVIDGR-1.0",
        _percent(("accuracy", "sensitivity COVID-19"), {"best ensemble": (77.0, 78.0), "COVID-SDNet": (76.0, 73.0)}),
        "a fifth of 426 COVID-19 and 426 normal patients of COVIDGR-1.0",
        "80/20, one split",
        "A fifth is 170 images: 95 % of such accuracies lie within 6 points of the true one.",
    ),
}


def check_counts(table: PublishedTable) -> pd.DataFrame:
    """Whether each row can come from the counts behind it: see `kitlib.reports.reported_counts.check_table`.

    Rows of means are not checked.

    Empty for a table whose counts are not known.
    """
    if table.counts is None:
        return pd.DataFrame()
    single = table.rows[["mean" not in name for name in table.rows.index]]
    percent = (single * 100).round(2).rename(columns=lambda name: name.partition(" ")[0])
    return check_table(percent, *table.counts)


class UnknownTable(ValueError):
    """No published table of that name; the message lists those there are."""


def published(name: str) -> PublishedTable:
    """The table called `name`, a key of TABLES."""
    if name not in TABLES:
        raise UnknownTable(f"no published table is called {name!r}; there are: {', '.join(TABLES)}")
    return TABLES[name]


def beside(table: PublishedTable, drawn: Mapping[str, pd.DataFrame], level: float = 0.95) -> pd.DataFrame:
    """Text: the published rows, then a row for each of our models by name, of `draws`, with its interval.

    Columns are the published ones, and index levels `from` ("published", "here") and `model`. What one side lacks is "-".
    """
    rows = {}
    for name, row in table.rows.iterrows():
        spread = table.spread.loc[name] if table.spread is not None else {}
        rows["published", name] = {column: _cell(row[column], spread.get(column)) for column in table.rows.columns}
    for name, draws in drawn.items():
        told = intervals(draws[[column for column in table.rows.columns if column in draws]], level).set_index("name")
        rows["here", name] = {figure: _interval_cell(*each[["value", "low", "high"]]) for figure, each in told.iterrows()}
    text = pd.DataFrame.from_dict(rows, orient="index", columns=list(table.rows.columns)).fillna("-")
    text.index = pd.MultiIndex.from_tuples(list(rows), names=["from", "model"])
    return text


def what_differs(table: PublishedTable, given: Judged, protocol: str) -> pd.DataFrame:
    """Rows data, protocol and faults with columns published and here: why the two parts of `beside` are no rank.

    `protocol` says how ours was made, such as "3 patient-grouped folds, nested".
    """
    counts = np.bincount(given.truth, minlength=len(given.classes))
    classes = ", ".join(f"{count:,} {name}" for name, count in zip(given.classes, counts, strict=True))
    sources = ", ".join(sorted({str(name) for name in given.source}))
    patients = len(np.unique(given.answers.patient))
    lacking = [column for column in table.rows.columns if column.partition(" ")[2] not in ("", "macro", *given.classes)]
    here = f"{len(given.truth):,} images of {patients:,} patients: {classes}; from {sources}"
    if lacking:
        here += f"; nothing here is comparable to {', '.join(lacking)}"
    return pd.DataFrame(
        {"published": [table.data, table.protocol, table.faults], "here": [here, protocol, ""]},
        index=["data", "protocol", "faults"],
    )


def _cell(value: float, spread: float | None) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:.4f}" + (f" (sd {spread:.2f})" if spread is not None else "")


def _interval_cell(value: float, low: float, high: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f} [{low:.3f}, {high:.3f}]"

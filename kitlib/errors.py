"""Every error that the kit raises on purpose, one class per domain, all derived from `KitError`.

Messages name the file, the value and what to do. Anything else that escapes from kitlib is a bug in the kit.
"""

from pathlib import Path


class KitError(Exception):
    """Base class of all errors that the kit raises on purpose."""


class SettingsError(KitError, ValueError):
    """Raised for an unknown recipe, setting or published table, or an invalid value. The message lists what is valid."""


class InputNotFound(KitError, FileNotFoundError):
    """Raised when the folder of an input does not exist. The message lists the inputs that exist."""


class RunNotFound(InputNotFound):
    """Raised when a run does not exist. The message lists the runs that exist and the notebook that makes the run."""


class DeviceError(KitError, RuntimeError):
    """Raised when a GPU cannot be used for training. The message gives the reason and an alternative."""


class TableError(KitError, ValueError):
    """Raised when a table does not match its schema. The message names the table, the column and a row."""


class BundleError(KitError, ValueError):
    """Raised when a bundle (a trained model's folder) or weights file is missing, damaged, or does not match its record."""


class UnreadableXray(KitError):
    """Raised when a file cannot be read as an X-ray. `path` is the file, `reason` says why in a few words."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class MaskError(KitError, ValueError):
    """Raised when a mask is missing, damaged, or differs in size from its image."""


class CacheError(KitError, RuntimeError):
    """Raised when the cache of decoded X-rays itself fails: the disk is full, an entry is damaged, an id is too long."""


class DatasetError(KitError, ValueError):
    """Raised when a data set cannot be read, a patient is in several folds, or annotations do not match their images."""


class ScoringError(KitError, ValueError):
    """Raised when predictions do not match the ground truth they are scored against."""


class SubmissionError(KitError, ValueError):
    """Raised when a submission file cannot be read. The message names the file, the row and the fix."""


class FusionError(KitError, ValueError):
    """Raised when predictions cannot be fused or stacked, for example because they are not out of fold."""


class TrainingError(KitError, RuntimeError):
    """Raised when training fails, or when the run folder already contains a training with other settings."""


class RunError(KitError, ValueError):
    """Raised when a folder is not a finished run of the expected kind. The message says which notebook to run first."""


class PredictionError(KitError, RuntimeError):
    """Raised when a process that predicts fails, dies or gets stuck."""


class NotebookError(KitError, RuntimeError):
    """Raised when a notebook stops early. The message names the notebook, the cell, the error and the log."""


class LeaderboardError(KitError, ValueError):
    """Raised when runs cannot be compared, or a run name is unknown."""


class KernelError(KitError, ValueError):
    """Raised when a Kaggle kernel cannot be built, rehearsed, pushed or submitted. The message says what to do."""


class KaggleUnreachable(KernelError):
    """Raised when Kaggle cannot be reached or has a fault of its own, so that the same request may succeed later."""


class PlanError(KitError, ValueError):
    """Raised when a plan is invalid or does not finish. The message names the file and step, or the failed runs and logs."""


class PageError(KitError, ValueError):
    """Raised when the page cannot do what a visitor asks. The message tells the visitor why, in plain text."""

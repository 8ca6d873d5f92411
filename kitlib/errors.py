"""Every error that the kit raises on purpose, one class for each domain, all derived from `KitError`.

Messages name the file, the value and what to do. Anything else that escapes from kitlib is a fault of the kit.
"""

from pathlib import Path


class KitError(Exception):
    """Base class: catch it to catch every error that the kit raises on purpose."""


class SettingsError(KitError, ValueError):
    """An unknown recipe, setting or published table, or a value that a setting does not allow; lists what is valid."""


class InputNotFound(KitError, FileNotFoundError):
    """No folder exists for an input; lists the folders that were searched."""


class DeviceError(KitError, RuntimeError):
    """A GPU that cannot be used for training: gives the reason and what to choose instead."""


class TableError(KitError, ValueError):
    """A table that breaks its contract: names the table, the column and the rows."""


class BundleError(KitError, ValueError):
    """A bundle or weights file that is missing, damaged, or does not match its record."""


class UnreadableXray(KitError):
    """A file that does not give an X-ray: `path`, and the `reason` in a few words."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class MaskError(KitError, ValueError):
    """A mask that is missing, damaged, or differs in size from its image."""


class CacheError(KitError, RuntimeError):
    """The cache of decoded X-rays has failed, not an image: the disk is full, an entry is damaged, an id is too long."""


class DatasetError(KitError, ValueError):
    """A data set that cannot be read, folds that a patient crosses, or an annotation file that does not fit its images."""


class ScoringError(KitError, ValueError):
    """Predictions that do not match the ground truth they are scored against."""


class SubmissionError(KitError, ValueError):
    """A submission file that cannot be read: names the file, the row and the fix."""


class FusionError(KitError, ValueError):
    """Predictions that cannot be stacked or tuned on, such as scores that are not out-of-fold."""


class TrainingError(KitError, RuntimeError):
    """A training that failed, or a run folder that holds a training with other settings."""


class RunError(KitError, ValueError):
    """A folder that is not a finished run of the expected kind; says which notebook to run first."""


class NotebookError(KitError, RuntimeError):
    """A notebook that stopped: names the notebook, the cell, the error and the log."""


class LeaderboardError(KitError, ValueError):
    """Runs that cannot be compared, or an unknown run name."""


class KernelError(KitError, ValueError):
    """A Kaggle kernel that cannot be built, rehearsed or pushed: names the file or package, and what to do."""


class PlanError(KitError, ValueError):
    """A plan that is invalid or did not finish: names the file and step, or the failed runs and their logs."""


class PageError(KitError, ValueError):
    """Something the page cannot show. The message is plain text for the person who uses it, in whole sentences."""

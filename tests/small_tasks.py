"""Tasks on small data sets such as SmallXrays, and their training."""

from kitlib.training.driver import train_fold
from kitlib.training.task import Task


def small_task(small, recipe, model_name="small", workers=0, **options):
    """Return a task on all tables of `small`; without workers, which on a GPU would take longer to start than to train."""
    return Task(small.tables(), small, recipe, model_name, workers=workers, **options)


def train_small(folder, small, recipe, fold=1, **options):
    """Train one fold of a task on `small` and return its results."""
    return train_fold(small_task(small, recipe, **options), fold, folder)

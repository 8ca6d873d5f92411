"""What an ensemble may set, and the training of FLANNEL's weights on learners' scores."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch

from kitlib.fusion.flannel import FlannelWeights, class_weights, focal_loss
from kitlib.settings import Range, RecipeError, Settings, override

NotNegative = Annotated[float, Range(at_least=0)]
AtLeastOne = Annotated[int, Range(at_least=1)]


@dataclass(frozen=True)
class EnsembleSettings(Settings):
    """How learners become one answer. All but `method` and `stack_on` is of FLANNEL's training alone."""

    # "vote" counts each learner's class; "weighted" is a mean with weights that sum to 1
    method: Literal["mean", "vote", "weighted", "flannel"] = "flannel"
    # the scores it learns from; "in_sample": of the learners' own training images, as published
    stack_on: Literal["out_of_fold", "in_sample"] = "out_of_fold"
    gamma: NotNegative = 2.0  # of the focal loss; the papers give none, Lin et al. 2
    alpha: Literal["balanced", "published"] = "balanced"  # weight of a class: N / (C n_c), or 1000 / n_c
    reduction: Literal["mean", "sum"] = "mean"  # of the loss over a batch; the published code sums
    start: Literal["equal", "random"] = "equal"  # weights before the first step; the published code starts at random
    learning_rate: Annotated[float, Range(above=0)] = 3e-3  # Adam
    weight_decay: NotNegative = 1e-4
    batch_size: AtLeastOne = 128
    epochs: AtLeastOne = 200
    # epochs without a better loss on the held-out fold before training stops; 0: all epochs, nothing held out
    patience: Annotated[int, Range(at_least=0)] = 20
    seed: int = 0  # of order and random start

    @property
    def learns(self) -> bool:
        return self.method in ("weighted", "flannel")


ENSEMBLES = {
    "mean": EnsembleSettings(method="mean"),
    "vote": EnsembleSettings(method="vote"),
    "weighted": EnsembleSettings(method="weighted"),
    "flannel": EnsembleSettings(),
    "flannel_in_sample": EnsembleSettings(stack_on="in_sample"),  # the published fault alone, to see what it costs
    # Values of the authors' code (github.com/qxiaobu/FLANNEL), in-sample stacking included.
    "flannel_published": EnsembleSettings(
        stack_on="in_sample",
        gamma=10.0,
        alpha="published",
        reduction="sum",
        start="random",
        learning_rate=1e-5,
        batch_size=20,
        patience=0,
    ),
}


def ensemble_settings(name: str, **overrides: object) -> EnsembleSettings:
    """The settings of ENSEMBLES under `name`, changed. Raises RecipeError: an unknown name or field, a wrong value."""
    if name not in ENSEMBLES:
        raise RecipeError(f"no ensemble is called {name!r}; there are: {', '.join(ENSEMBLES)}")
    return override(ENSEMBLES[name], **overrides)


def train_flannel(
    probabilities: np.ndarray, truth: np.ndarray, settings: EnsembleSettings, held: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Weights (`weight` (K, (K C)^2), `bias` (K,), float32) and the held-out loss after each epoch.

    `probabilities` (n, K, C), `truth` (n,) classes from 0. Rows that `held` marks are not trained on: after each epoch the
    loss is taken on them, training stops when it has not fallen for `patience` epochs, and the best epoch's weights are
    kept. With patience 0, or none held, all rows and epochs serve and no loss is given. Raises ValueError without rows to
    train on. Runs on the CPU; the same rows and settings give the same weights.
    """
    held = np.zeros(len(truth), bool) if held is None or not settings.patience else np.asarray(held, bool)
    if held.all():
        raise ValueError(f"FLANNEL's weights have no rows to train on: of {len(truth)}, {int(held.sum())} are held out")
    scores, target = torch.as_tensor(probabilities, dtype=torch.float32), torch.as_tensor(truth, dtype=torch.long)
    alpha = class_weights(target[~held], scores.shape[2], settings.alpha)
    train, validation = (scores[~held], target[~held]), (scores[held], target[held])
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(settings.seed)
        model = _beginning(*scores.shape[1:], settings)
        rate, decay = settings.learning_rate, settings.weight_decay
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay, fused=True)
        best = copy.deepcopy(model.linear.state_dict())
        for _ in range(settings.epochs):
            _epoch(model, optimizer, train, alpha, settings)
            if held.any():
                with torch.no_grad():
                    losses.append(float(focal_loss(model(validation[0]), validation[1], alpha, settings.gamma).mean()))
                since = len(losses) - 1 - int(np.argmin(losses))
                if since > settings.patience:
                    break
            if not held.any() or not since:
                best = copy.deepcopy(model.linear.state_dict())
    return {name: best[name].numpy() for name in ("weight", "bias")}, losses


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small cost threads far more than they gain, most of all on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _beginning(learners: int, classes: int, settings: EnsembleSettings) -> FlannelWeights:
    model = FlannelWeights(learners, classes)
    if settings.start == "equal":
        torch.nn.init.zeros_(model.linear.weight)
        torch.nn.init.constant_(model.linear.bias, math.atanh(0.5))  # every weight is 1/2
    return model


def _epoch(
    model: FlannelWeights,
    optimizer: torch.optim.Optimizer,
    rows: tuple[torch.Tensor, torch.Tensor],
    alpha: torch.Tensor,
    settings: EnsembleSettings,
) -> None:
    # A plain loop: with a network this small, a step under pytorch-lightning takes many times as long as the network.
    for chosen in torch.randperm(len(rows[1])).split(settings.batch_size):
        loss = focal_loss(model(rows[0][chosen]), rows[1][chosen], alpha, settings.gamma)
        optimizer.zero_grad()
        (loss.sum() if settings.reduction == "sum" else loss.mean()).backward()
        optimizer.step()

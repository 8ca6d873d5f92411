"""FLANNEL's weights of learners, its focal loss and its training on learners' scores; and what any ensemble may set.

Qiao et al., FLANNEL (Focal Loss bAsed Neural Network EnsembLe) for COVID-19 detection, JAMIA 28(3), 2021; "Patched FLANNEL",
section 2.3.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from kitlib.errors import SettingsError
from kitlib.settings import AtLeastOne, Count, NotNegative, Positive, Settings, override


class FlannelWeights(nn.Module):
    """One weight an image and learner out of all pairs of the learners' probabilities: (K C)^2 K + K parameters.

    f is the concatenation of the K learners' C probabilities, W = tanh(linear(f f^T, row by row)), and the logits are the
    sum over learners of W_k P_k. With probabilities on the simplex no softmax of these passes e^K / (e^K + C - 1).
    """

    def __init__(self, learners: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear((learners * classes) ** 2, learners)

    def weights(self, probabilities: torch.Tensor) -> torch.Tensor:
        """(n, K, C) in 0..1 -> (n, K) in -1..1."""
        features = probabilities.flatten(1)
        pairs = features[:, :, None] * features[:, None, :]
        return torch.tanh(self.linear(pairs.flatten(1)))

    def forward(self, probabilities: torch.Tensor) -> torch.Tensor:
        """(n, K, C) -> logits (n, C)."""
        return (self.weights(probabilities)[:, :, None] * probabilities).sum(dim=1)


def focal_loss(logits: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor, gamma: float) -> torch.Tensor:
    """-alpha_y (1 - p_y)^gamma log p_y an image, (n,); Lin et al. 2017 (ICCV), equation 5, on a softmax.

    `logits` (n, C), `target` (n,) classes from 0, `alpha` (C,). Cross entropy at gamma 0. Finite, and so is its gradient,
    where p_y rounds to 0 or 1.
    """
    log_p = logits.log_softmax(dim=1).gather(1, target[:, None])[:, 0]
    # At p = 1 the power's gradient would be infinite for a gamma below 1.
    missed = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -alpha[target] * missed**gamma * log_p


def class_weights(target: torch.Tensor, classes: int, kind: str) -> torch.Tensor:
    """Alpha of each class (C,), from how often it occurs in `target`: N / (C n_c) "balanced", 1000 / n_c "published".

    C counts the classes that occur; the weight of one that does not is 0, as nothing asks for it.
    """
    counts = torch.bincount(target, minlength=classes).to(torch.get_default_dtype())
    there = counts > 0
    total = 1000.0 if kind == "published" else len(target) / max(1, int(there.sum()))
    return torch.where(there, total / counts.clamp(min=1), torch.zeros_like(counts))


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
    learning_rate: Positive = 3e-3  # Adam
    weight_decay: NotNegative = 1e-4
    batch_size: AtLeastOne = 128
    epochs: AtLeastOne = 200
    # epochs without a better loss on the held-out fold before training stops; 0: all epochs, nothing held out
    patience: Count = 20
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
    """The settings of ENSEMBLES under `name`, changed. Raises SettingsError: an unknown name or field, a wrong value."""
    if name not in ENSEMBLES:
        raise SettingsError(f"no ensemble is called {name!r}; there are: {', '.join(ENSEMBLES)}")
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
        model = _beginning(scores.shape[1], scores.shape[2], settings)
        rate, decay = settings.learning_rate, settings.weight_decay
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay, fused=True)
        best, since = copy.deepcopy(model.linear.state_dict()), 0  # epochs since the best
        for _ in range(settings.epochs):
            _epoch(model, optimizer, train, alpha, settings)
            if held.any():
                with torch.no_grad():
                    losses.append(float(focal_loss(model(validation[0]), validation[1], alpha, settings.gamma).mean()))
                since = len(losses) - 1 - int(np.argmin(losses))
                if since > settings.patience:
                    break
            if not since:
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

"""FLANNEL (its network, focal loss and training on learners' scores) and the settings of all ensemble methods.

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
    """Network that computes a weight of each of K learners for an image, from products of their class probabilities.

    P_k (C,) are the class probabilities of learner k, and f (K C,) is the P_k of all learners, concatenated. The weights
    (K,) are W = tanh(linear(f f^T)), with f f^T flattened row by row. The logits (C,) are the sum of W_k P_k over the
    learners. The network has (K C)^2 K + K parameters. If the probabilities of each learner sum to 1, the softmax of the
    logits is at most e^K / (e^K + C - 1).
    """

    def __init__(self, learners: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear((learners * classes) ** 2, learners)

    def weights(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return a weight for each image and learner, (n, K), -1..1; `probabilities` (n, K, C) are those of the learners."""
        features = probabilities.flatten(1)
        pairs = features[:, :, None] * features[:, None, :]
        return torch.tanh(self.linear(pairs.flatten(1)))

    def forward(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return the ensemble's logits (n, C) for the learners' probabilities (n, K, C)."""
        return (self.weights(probabilities)[:, :, None] * probabilities).sum(dim=1)


def focal_loss(logits: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the focal loss of each image, (n,): -alpha_y (1 - p_y)^gamma log p_y, with p the softmax of the logits.

    `logits` is (n, C), `target` (n,) holds the index y of each image's true class, and `alpha` (C,) the weight of each
    class. With gamma = 0, this is the weighted cross entropy. The loss and its gradient stay finite even if p_y rounds to 0
    or 1. Source: Lin et al. 2017 (ICCV), equation 5.
    """
    log_p = logits.log_softmax(dim=1).gather(1, target[:, None])[:, 0]
    # The clamp keeps the gradient of the power finite at p = 1 if gamma is below 1.
    missed = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -alpha[target] * missed**gamma * log_p


def class_weights(target: torch.Tensor, classes: int, kind: str) -> torch.Tensor:
    """Return the loss weight of each class, (classes,), from its frequency in `target` (N,), the true class indices.

    A class that occurs n times gets N / (C n) if `kind` is "balanced", and 1000 / n if `kind` is "published". C is the
    number of classes that occur. A class that does not occur gets 0.
    """
    counts = torch.bincount(target, minlength=classes).to(torch.get_default_dtype())
    occurs = counts > 0
    total = 1000.0 if kind == "published" else len(target) / max(1, int(occurs.sum()))
    return torch.where(occurs, total / counts.clamp(min=1), torch.zeros_like(counts))


@dataclass(frozen=True)
class EnsembleSettings(Settings):
    """Settings of an ensemble. All fields except `method` and `stack_on` apply only to the training of FLANNEL."""

    # "vote": majority vote over each learner's most probable class; "weighted": mean with weights that sum to 1
    method: Literal["mean", "vote", "weighted", "flannel"] = "flannel"
    # the scores to train on; "in_sample": the learners' predictions for their own training images, as published
    stack_on: Literal["out_of_fold", "in_sample"] = "out_of_fold"
    gamma: NotNegative = 2.0  # exponent of the focal loss; not stated in the FLANNEL papers, 2 in Lin et al.
    alpha: Literal["balanced", "published"] = "balanced"  # class weight in the loss: N / (C n_c) or 1000 / n_c
    reduction: Literal["mean", "sum"] = "mean"  # reduction of the loss over a batch; the published code uses the sum
    start: Literal["equal", "random"] = "equal"  # initial learner weights; random in the published code
    learning_rate: Positive = 3e-3  # Adam
    weight_decay: NotNegative = 1e-4
    batch_size: AtLeastOne = 128
    epochs: AtLeastOne = 200
    # training stops after more than this many epochs without a lower loss on held-out rows; 0: all epochs, no held-out rows
    patience: Count = 20
    seed: int = 0  # seed of the row order, the held-out fold and the random start

    @property
    def learns(self) -> bool:
        """Whether the method is trained: "weighted" and "flannel" are, "mean" and "vote" are not."""
        return self.method in ("weighted", "flannel")


ENSEMBLES = {
    "mean": EnsembleSettings(method="mean"),
    "vote": EnsembleSettings(method="vote"),
    "weighted": EnsembleSettings(method="weighted"),
    "flannel": EnsembleSettings(),
    # The kit's settings with the published fault of in-sample stacking, to measure what that fault costs.
    "flannel_in_sample": EnsembleSettings(stack_on="in_sample"),
    # Settings of the authors' code (github.com/qxiaobu/FLANNEL), including in-sample stacking.
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


def ensemble_settings(name: str, /, **overrides: object) -> EnsembleSettings:
    """Return the settings `ENSEMBLES[name]` with `overrides` applied.

    Raises SettingsError for an unknown name or field, or an invalid value.
    """
    if name not in ENSEMBLES:
        raise SettingsError(f"unknown ensemble {name!r}; valid names are: {', '.join(ENSEMBLES)}")
    return override(ENSEMBLES[name], **overrides)


def train_flannel(
    probabilities: np.ndarray, truth: np.ndarray, settings: EnsembleSettings, held_out: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Train FLANNEL; return a dict with its weights, and a list with the loss on held-out rows after each epoch.

    The weights are float32 arrays, `weight` (K, (K C)^2) and `bias` (K,). `probabilities` (n, K, C) are those of K learners,
    `truth` (n,) holds the true class indices, and `held_out` (n,) is True for rows that are only used for validation.
    Training stops if the loss on held-out rows has not decreased for more than `patience` epochs; the returned weights are
    those of the epoch with the lowest loss. If `patience` is 0 or no row is held out, training uses all rows and epochs, and
    the list is empty. Raises ValueError if all rows are held out. Training runs on the CPU and is deterministic.
    """
    held_out = np.zeros(len(truth), bool) if held_out is None or not settings.patience else np.asarray(held_out, bool)
    if held_out.all():
        raise ValueError(f"FLANNEL has no rows to train on: {int(held_out.sum())} of {len(truth)} rows are held out")
    scores, target = torch.as_tensor(probabilities, dtype=torch.float32), torch.as_tensor(truth, dtype=torch.long)
    alpha = class_weights(target[~held_out], scores.shape[2], settings.alpha)
    train, validation = (scores[~held_out], target[~held_out]), (scores[held_out], target[held_out])
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(settings.seed)
        model = _initial_model(scores.shape[1], scores.shape[2], settings)
        rate, decay = settings.learning_rate, settings.weight_decay
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay, fused=True)
        best, epochs_since_best = copy.deepcopy(model.linear.state_dict()), 0
        for _ in range(settings.epochs):
            _train_epoch(model, optimizer, train, alpha, settings)
            if held_out.any():
                with torch.no_grad():
                    losses.append(float(focal_loss(model(validation[0]), validation[1], alpha, settings.gamma).mean()))
                epochs_since_best = len(losses) - 1 - int(np.argmin(losses))
                if epochs_since_best > settings.patience:
                    break
            if not epochs_since_best:
                best = copy.deepcopy(model.linear.state_dict())
    return {name: best[name].numpy() for name in ("weight", "bias")}, losses


@contextmanager
def _one_thread() -> Iterator[None]:
    """Context manager that limits torch to one thread, because more threads are slower with such small matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _initial_model(learners: int, classes: int, settings: EnsembleSettings) -> FlannelWeights:
    model = FlannelWeights(learners, classes)
    if settings.start == "equal":
        torch.nn.init.zeros_(model.linear.weight)
        torch.nn.init.constant_(model.linear.bias, math.atanh(0.5))  # every weight is 1/2
    return model


def _train_epoch(
    model: FlannelWeights,
    optimizer: torch.optim.Optimizer,
    rows: tuple[torch.Tensor, torch.Tensor],
    alpha: torch.Tensor,
    settings: EnsembleSettings,
) -> None:
    # A plain loop: for a network this small, pytorch-lightning's overhead per step is many times the step itself.
    for chosen in torch.randperm(len(rows[1])).split(settings.batch_size):
        loss = focal_loss(model(rows[0][chosen]), rows[1][chosen], alpha, settings.gamma)
        optimizer.zero_grad()
        (loss.sum() if settings.reduction == "sum" else loss.mean()).backward()
        optimizer.step()

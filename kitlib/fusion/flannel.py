"""FLANNEL's weights of learners as a module to train, and its focal loss.

Qiao et al., FLANNEL (Focal Loss bAsed Neural Network EnsembLe) for COVID-19 detection, JAMIA 28(3), 2021; "Patched FLANNEL",
section 2.3.
"""

import torch
from torch import nn


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

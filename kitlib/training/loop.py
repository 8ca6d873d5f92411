"""The training loop, on Lightning: optimiser, learning rate schedule, moving average, early stopping and exact resume."""

import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.warnings import PossibleUserWarning
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3

from kitlib.atomic import replacing
from kitlib.deadline import Deadline, SessionOver, epoch_fits
from kitlib.device import derived_seed, gpu_of, precision, process_group_backend
from kitlib.recipes.fields import TrainingRecipe
from kitlib.training import data_parallel
from kitlib.training.curves import open_curves
from kitlib.training.fold_folder import LEARNING_RATE_FLOOR, FitResult, find_kept_epoch, is_over
from kitlib.training.progress import Progress


class RecipeTraining(pl.LightningModule):
    """Base class of Lightning modules that train a network with the optimiser and the schedule of a recipe.

    A subclass implements `training_step`, which must run `model`, and `validation_step`, which must run `evaluated_model`.
    Validation must log `score` (greater is better), which decides the best epoch and early stopping. Metrics that are logged
    once per epoch become columns of the history. The weights that are kept are those of `evaluated_model`.
    """

    def __init__(self, model: torch.nn.Module, recipe: TrainingRecipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        # A submodule, so that it moves to the GPU and is part of the checkpoint.
        self.average = moving_average(model, recipe.ema_decay) if recipe.ema_decay else None

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """The network to validate: the moving average of `model` if the recipe uses one, else `model`."""
        return self.model if self.average is None else self.average.module

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer(self.model, self.recipe)
        if self.recipe.schedule == "plateau":  # _EpochKeeper sets the rate from the validation scores
            return {"optimizer": optimizer}
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, self.recipe))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        if self.average is not None:
            # Lightning increments global_step after this hook.
            self.average.update(self.model, step=self.trainer.global_step + 1)


def moving_average(model: torch.nn.Module, decay: float) -> ModelEmaV3:
    """Return a copy of a network that holds the exponential moving average of its weights and running statistics.

    The average is updated after each optimiser step: step n multiplies the previous average by min(decay, 1 - n^(-3/4)), so
    that the random initialisation is soon forgotten. A decay of 0.998 is reached after 4,000 steps; after 100 steps, the
    average covers about the last 30 steps.
    """
    average = ModelEmaV3(model, decay, use_warmup=True, warmup_power=0.75)
    average.requires_grad_(False)
    return average


def make_optimizer(model: torch.nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe (SGD with Nesterov momentum, Adam or AdamW) for the parameters of `model`.

    The optimiser gets the parameters that require gradients; biases and normalisation layers get no weight decay. A network
    may have a method `rates()`, which returns a dict from prefixes of parameter names to factors. The recipe's learning rate
    is multiplied by the factor of a parameter's longest matching prefix. Parameters with such a prefix are included even
    while they are frozen, so that they can be unfrozen later. Raises ValueError if a prefix matches no parameter, or if the
    network has no parameter to train.
    """
    rates: dict[str, float] = getattr(model, "rates", dict)()
    unmatched_prefixes = set(rates)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        prefixes = [prefix for prefix in rates if name.startswith(prefix)]
        unmatched_prefixes -= set(prefixes)
        if prefixes or parameter.requires_grad:
            rate = rates[max(prefixes, key=len)] if prefixes else 1.0
            decay = 0.0 if parameter.ndim <= 1 or name.endswith(".bias") else recipe.weight_decay
            groups.setdefault((recipe.learning_rate * rate, decay), []).append(parameter)
    if unmatched_prefixes or not groups:
        unmatched = " or ".join(sorted(unmatched_prefixes))
        missing = f"whose name starts with {unmatched}" if unmatched else "that is not frozen"
        raise ValueError(f"{type(model).__name__} has no parameter {missing}")
    parameter_groups = [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
    if recipe.optimizer == "sgd":
        momentum = recipe.momentum
        return torch.optim.SGD(parameter_groups, lr=recipe.learning_rate, momentum=momentum, nesterov=momentum > 0)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameter_groups, lr=recipe.learning_rate)
    return torch.optim.AdamW(parameter_groups, lr=recipe.learning_rate)


def learning_rate_factor(step: int, steps: int, recipe: TrainingRecipe) -> float:
    """Return the factor (0..1) by which the recipe's learning rate is multiplied at optimiser step `step` (from 0).

    `steps` is the number of optimiser steps in all epochs. With the schedule "cosine", the factor rises linearly over
    `warmup_epochs`, then it is 0.5 (1 + cos(pi t / T)) 0.95 + 0.05 (Heidelberg report, eq. 1). The recipe's schedule_every
    determines t and T:

    - 0: t is the number of steps since the warm-up, and T is the number of all steps after it. The factor falls to 0.05.
    - e > 0: t is the number of epochs since the start of training, divided by e and rounded down, and T is the number of all
      epochs. With the published e = 2, t ends at about T / 2 and the factor at about 0.525; with e = 1, t ends at T - 1.

    With the schedule "step", the factor is step_factor to the power of the number of milestones (in epochs) passed.
    """
    if recipe.schedule == "step":
        # Computed in integers, so that exactly the first step after a milestone gets the new rate.
        return recipe.step_factor ** sum(step * recipe.epochs >= milestone * steps for milestone in recipe.milestones)
    warmup = round(steps * recipe.warmup_epochs / recipe.epochs)
    if recipe.schedule_every:
        epoch = step * recipe.epochs // steps
        progress = min(1.0, epoch // recipe.schedule_every / recipe.epochs)
    else:
        progress = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    warm_up_factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return warm_up_factor * (LEARNING_RATE_FLOOR + (1 - LEARNING_RATE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def plateau_factor(scores: Sequence[float], recipe: TrainingRecipe) -> float:
    """Return the factor by which the schedule "plateau" multiplies the recipe's learning rate in the next epoch.

    `scores` has the validation score of each epoch so far. The factor is 0.1 to the power of the number of plateaus, counted
    as in torch's ReduceLROnPlateau. It depends on the scores alone, so that resumed training uses the same rate as
    uninterrupted training.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=recipe.plateau_epochs)
    for score in scores:
        schedule.step(score)
    return optimizer.param_groups[0]["lr"]


def batches_per_step(recipe: TrainingRecipe) -> int:
    """Return the number of batches whose gradients are accumulated for one optimiser step.

    It is nominal_batch / batch_size, rounded as in ultralytics, and at least 1.
    """
    return max(1, round(recipe.nominal_batch / recipe.batch_size))


def fit(
    module: RecipeTraining,
    recipe: TrainingRecipe,
    train_batches: Iterable,
    validation_batches: Iterable,
    run_folder: str | Path,
    device: torch.device,
    seed: int,
    title: str = "training",
    deadline: Deadline | None = None,
) -> FitResult:
    """Train a module with a recipe, and return the history and the kept epoch.

    Afterwards `module.model` is on the CPU and has the weights of the kept epoch, which are those of the moving average if
    the recipe uses one. Training ends after the recipe's `epochs`, or earlier if the score has not risen for `patience`
    epochs.

    After each epoch `run_folder/checkpoints` contains last.ckpt, from which a later call resumes, and best.safetensors, the
    weights of the epoch to keep. If another epoch would not end before `deadline`, raises SessionOver; last.ckpt is then
    complete. An epoch's random numbers depend on `seed` and the epoch number alone: on a CPU, with the same number of
    threads, resumed training equals uninterrupted training bit for bit. The optimiser steps after every
    `batches_per_step(recipe)` batches, and after an epoch's last batch. If fewer batches are left for the last step of an
    epoch, its gradient is proportionally smaller.

    If several processes train together (kitlib.training.data_parallel), each calls this function with its share of the
    batches; only the first process writes files and loads the kept weights.
    """
    folder = Path(run_folder) / "checkpoints"
    last = folder / "last.ckpt"
    processes = data_parallel.rank_and_world_size()[1]
    kind = recipe.curves if data_parallel.is_first_process() else ""
    with _silence_lightning(), open_curves(kind, Path(run_folder) / "curves", title) as curves:
        keeper = _EpochKeeper(folder, module, recipe, seed, Progress(title, recipe.epochs, curves), deadline)
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            **_device_arguments(device, processes),
            precision=precision(device),
            max_epochs=recipe.epochs,
            accumulate_grad_batches=batches_per_step(recipe),
            gradient_clip_val=recipe.gradient_clip or None,
            callbacks=[keeper],
            benchmark=device.type == "cuda",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=run_folder,
        )
        # The kit wrote the checkpoint itself, but weights_only is still safer: a pickle could run code.
        history = _read_history(last)
        if history and is_over(history, recipe):
            keeper.history = history
        elif not epoch_fits(deadline, [row["seconds"] for row in history]):
            raise SessionOver(Path(run_folder), len(history), recipe.epochs)
        else:
            trainer.fit(module, train_batches, validation_batches, ckpt_path=last if history else None, weights_only=True)
    if not is_over(keeper.history, recipe):
        raise SessionOver(Path(run_folder), len(keeper.history), recipe.epochs)
    module.to("cpu")
    if data_parallel.is_first_process():
        module.model.load_state_dict(load_file(folder / "best.safetensors"))
    return FitResult(pd.DataFrame(keeper.history), find_kept_epoch(keeper.history, recipe) + 1)


def _device_arguments(device: torch.device, processes: int) -> dict[str, Any]:
    """Return the arguments `devices` and `strategy` of Lightning's Trainer for training with `processes` processes."""
    if processes == 1:
        return {"devices": [device.index or 0] if device.type == "cuda" else 1, "strategy": "auto"}
    backend = process_group_backend()
    if backend == "gloo" and device.type == "cuda":
        # With explicit devices Lightning does not require as many GPUs as processes.
        gpus = [gpu_of(process) for process in range(processes)]
        return {"devices": 1, "strategy": DDPStrategy(parallel_devices=gpus, process_group_backend=backend)}
    return {"devices": processes, "strategy": DDPStrategy(process_group_backend=backend or None)}


class _EpochKeeper(pl.Callback):
    """Callback that seeds each epoch, records the history, writes the checkpoint and best weights, and ends training."""

    def __init__(
        self,
        folder: Path,
        module: RecipeTraining,
        recipe: TrainingRecipe,
        seed: int,
        progress: Progress,
        deadline: Deadline | None,
    ) -> None:
        self.folder, self.module, self.recipe, self.seed, self.deadline = folder, module, recipe, seed, deadline
        self.progress = progress
        self.history: list[dict[str, float]] = []
        self.session_seconds: list[float] = []  # seconds of this session's epochs
        self.epoch_start = self.training_end = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Random draws, such as dropout, must differ between processes.
        rank = data_parallel.rank_and_world_size()[0]
        torch.manual_seed(derived_seed(self.seed, trainer.current_epoch, *([rank] if rank else [])))
        if self.recipe.schedule == "plateau":
            factor = plateau_factor([row["score"] for row in self.history], self.recipe)
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
        self.epoch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.progress.log_batch(trainer.current_epoch + 1, batch_idx + 1, int(trainer.num_training_batches))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            # GPU steps are asynchronous; without synchronisation, images_per_s would be too high.
            torch.cuda.synchronize(pl_module.device)
        self.training_end = time.perf_counter()

    # Not on_validation_end, because from a checkpoint written in that hook Lightning would resume within the epoch.
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not math.isfinite(logged.get("score", math.nan)):
            raise ValueError(
                f"epoch {trainer.current_epoch + 1}: the validation score is missing or not finite: the training diverged, "
                f"or the validation fold is too small. Lower learning_rate or raise limit_validation. Logged: {logged}"
            )
        assert trainer.train_dataloader is not None  # `fit` always passes one
        images = trainer.num_training_batches * trainer.train_dataloader.batch_sampler.batch_size
        self.session_seconds.append(time.perf_counter() - self.epoch_start)
        self.history.append(
            {
                "epoch": trainer.current_epoch + 1,
                "seconds": self.session_seconds[-1],
                "images_per_s": images / max(1e-9, self.training_end - self.epoch_start),
                "learning_rate": max(group["lr"] for group in trainer.optimizers[0].param_groups),
                **logged,
            }
        )
        if trainer.is_global_zero:
            self._write(trainer)
        else:
            trainer.save_checkpoint(
                self.folder / "last.ckpt"
            )  # a collective call: every process takes part, only the first writes
        # The first process decides for all of them, because their clocks differ.
        should_stop = is_over(self.history, self.recipe) or not epoch_fits(self.deadline, self.session_seconds)
        trainer.should_stop = trainer.strategy.broadcast(should_stop)
        self.progress.log_epoch(self.history, self.session_seconds)

    def _write(self, trainer: pl.Trainer) -> None:
        if find_kept_epoch(self.history, self.recipe) == len(self.history) - 1:
            state = self.module.evaluated_model.state_dict().items()
            weights = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state}
            with replacing(self.folder / "best.safetensors") as temporary_path:
                save_file(weights, temporary_path)
        with replacing(self.folder / "last.ckpt") as temporary_path:
            trainer.save_checkpoint(temporary_path)


def _read_history(checkpoint: Path) -> list[dict[str, float]]:
    if not checkpoint.is_file():
        return []
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["callbacks"][_EpochKeeper.__qualname__]["history"]


@contextmanager
def _silence_lightning() -> Iterator[None]:
    """Context manager that hides Lightning's messages about devices, tips and numbers of workers.

    Other warnings are still shown.
    """
    names = ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [library_logger.level for library_logger in loggers]
    try:
        for library_logger in loggers:
            library_logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            # Lightning's data loading uses a name that torch has deprecated.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for library_logger, level in zip(loggers, levels, strict=True):
            library_logger.setLevel(level)

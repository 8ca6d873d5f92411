"""Training under pytorch-lightning: the optimiser, the schedule, early stopping and exact resume."""

import logging
import math
import sys
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
from tqdm import tqdm

from kitlib.atomic import replacing
from kitlib.deadline import Deadline, SessionOver, epoch_fits
from kitlib.device import derived_seed, gpu_of, precision, process_group_backend
from kitlib.recipes.fields import TrainingRecipe
from kitlib.training import data_parallel
from kitlib.training.fold_folder import LEARNING_RATE_FLOOR, Fitted, is_over, kept_row

logger = logging.getLogger(__name__)


class RecipeTraining(pl.LightningModule):
    """A network under a recipe's optimiser and schedule. A subclass adds `training_step` and validation.

    Training runs `model`, validation must run `judged`, in evaluation mode, and log `score` (greater is better): the best
    epoch, early stopping and the curves go by it. Everything logged once an epoch becomes a column of the history. Only the
    weights of `judged` are kept as the best ones.
    """

    def __init__(self, model: torch.nn.Module, recipe: TrainingRecipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        # A part of this module, so that it moves to the GPU and into the checkpoint with it.
        self.average = moving_average(model, recipe.ema_decay) if recipe.ema_decay else None

    @property
    def judged(self) -> torch.nn.Module:
        """The moving average of `model` if the recipe asks for one, else `model`."""
        return self.model if self.average is None else self.average.module

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer(self.model, self.recipe)
        if self.recipe.schedule == "plateau":  # set by _EpochKeeper, who knows the scores
            return {"optimizer": optimizer}
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, self.recipe))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        if self.average is not None:
            # Lightning counts the step only after this hook.
            self.average.update(self.model, step=self.trainer.global_step + 1)


def moving_average(model: torch.nn.Module, decay: float) -> ModelEmaV3:
    """The exponential moving average of a network's weights and running statistics, which learns nothing itself.

    Step n keeps min(decay, 1 - n^-3/4) of the average so far, so that the random start is soon forgotten: with 0.998
    the decay is reached after 4,000 steps, and a training of a hundred steps averages over its last thirty or so.
    """
    average = ModelEmaV3(model, decay, use_warmup=True, warmup_power=0.75)
    average.requires_grad_(False)
    return average


def make_optimizer(model: torch.nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, Adam or AdamW, over what is not frozen; biases and norms do not decay.

    A network may have a method `rates()`: prefix of parameter names -> share of the recipe's learning rate, the longest
    prefix counts. Parameters under such a prefix are taken also while they are frozen, so that they can learn later.
    Raises ValueError for a prefix that no parameter has, or a network with nothing to learn.
    """
    rates: dict[str, float] = getattr(model, "rates", dict)()
    unmet = set(rates)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        prefixes = [prefix for prefix in rates if name.startswith(prefix)]
        unmet -= set(prefixes)
        if prefixes or parameter.requires_grad:
            rate = rates[max(prefixes, key=len)] if prefixes else 1.0
            decay = 0.0 if parameter.ndim <= 1 or name.endswith(".bias") else recipe.weight_decay
            groups.setdefault((recipe.learning_rate * rate, decay), []).append(parameter)
    if unmet or not groups:
        raise ValueError(f"{type(model).__name__} has no parameter {' or '.join(sorted(unmet)) or 'that is not frozen'}")
    described = [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
    if recipe.optimizer == "sgd":
        momentum = recipe.momentum
        return torch.optim.SGD(described, lr=recipe.learning_rate, momentum=momentum, nesterov=momentum > 0)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(described, lr=recipe.learning_rate)
    return torch.optim.AdamW(described, lr=recipe.learning_rate)


def learning_rate_factor(step: int, steps: int, recipe: TrainingRecipe) -> float:
    """Share of the recipe's learning rate at a step (from 0) of `steps`, which the recipe's epochs share evenly.

    Up linearly over `warmup_epochs`, and half a cosine down: 0.5 (1 + cos(pi t / T)) 0.95 + 0.05, Heidelberg report, eq. 1.
    With schedule_every = 0, t and T are steps after the warm-up, and the end is the floor, 0.05. With e = 1 or more, t
    rises by one every e epochs from the training's start and T is the number of epochs: published is e = 2, which ends
    half-way, at t of nearly T / 2 and a factor of nearly 0.525; e = 1 ends one step above the floor.

    With schedule "step": step_factor to the power of the milestones, in epochs, that are over.
    """
    if recipe.schedule == "step":
        # In whole numbers: the first step after a milestone has the new rate, whatever the number of steps.
        return recipe.step_factor ** sum(step * recipe.epochs >= milestone * steps for milestone in recipe.milestones)
    warmup = round(steps * recipe.warmup_epochs / recipe.epochs)
    if recipe.schedule_every:
        epoch = step * recipe.epochs // steps
        done = min(1.0, epoch // recipe.schedule_every / recipe.epochs)
    else:
        done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    risen = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return risen * (LEARNING_RATE_FLOOR + (1 - LEARNING_RATE_FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


def plateau_factor(scores: Sequence[float], recipe: TrainingRecipe) -> float:
    """Share of the recipe's learning rate after epochs of these scores: a tenth for each plateau, as torch counts them.

    It follows from the scores alone, so that a resumed training takes the rate that it would have had.
    """
    probe = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(probe, "max", factor=0.1, patience=recipe.plateau_epochs)
    for score in scores:
        schedule.step(score)
    return probe.param_groups[0]["lr"]


def gathered_batches(recipe: TrainingRecipe) -> int:
    """Batches whose gradients make one step of the optimiser: nominal_batch / batch_size, rounded as ultralytics does."""
    return max(1, round(recipe.nominal_batch / recipe.batch_size))


def fit(
    module: RecipeTraining,
    recipe: TrainingRecipe,
    train_batches: Iterable,
    validation_batches: Iterable,
    run_folder: str | Path,
    device: torch.device,
    seed: int,
    progress: bool = True,
    title: str = "training",
    deadline: Deadline | None = None,
) -> Fitted:
    """Train until the recipe's epochs or patience are over, and leave the kept epoch's weights in `module.model` on the CPU.

    They are those of `module.judged`: its moving average, where the recipe has one.

    After each epoch `run_folder/checkpoints/last.ckpt` holds all that is needed to go on and `best.safetensors` the best
    weights; an existing last.ckpt is resumed from. What an epoch draws depends on `seed` and its number alone, so on a CPU,
    with as many threads, a resumed training equals an uninterrupted one bit for bit. The optimiser steps once in
    `gathered_batches` and at an epoch's end; a last group that is not full counts for as much as its images. Raises
    SessionOver, after a checkpoint, when another epoch would not end before `deadline`.

    Where several processes share the training (kitlib.training.data_parallel), each calls this with its share of the
    batches; the first alone writes, and it alone has the kept weights in the end.
    """
    folder = Path(run_folder) / "checkpoints"
    last = folder / "last.ckpt"
    processes = data_parallel.share()[1]
    keeper = _EpochKeeper(folder, module, recipe, seed, deadline)
    with _quiet_lightning():
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            **_devices(device, processes),
            precision=precision(device),
            max_epochs=recipe.epochs,
            accumulate_grad_batches=gathered_batches(recipe),
            callbacks=[keeper, *([_Progress(title, recipe.epochs)] if progress else [])],
            benchmark=device.type == "cuda",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=run_folder,
        )
        # The checkpoint is a pickle of our own making; weights_only keeps it from running code all the same.
        history = _history(last)
        if history and is_over(history, recipe):
            keeper.history = history
        elif not epoch_fits(deadline, [row["seconds"] for row in history]):
            raise SessionOver(Path(run_folder), len(history), recipe.epochs)
        else:
            trainer.fit(module, train_batches, validation_batches, ckpt_path=last if history else None, weights_only=True)
    if not is_over(keeper.history, recipe):
        raise SessionOver(Path(run_folder), len(keeper.history), recipe.epochs)
    module.to("cpu")
    if data_parallel.is_first():
        module.model.load_state_dict(load_file(folder / "best.safetensors"))
    return Fitted(pd.DataFrame(keeper.history), kept_row(keeper.history, recipe) + 1)


def _devices(device: torch.device, processes: int) -> dict[str, Any]:
    """Lightning's arguments for where to train, and for what processes that train together exchange gradients by."""
    if processes == 1:
        return {"devices": [device.index or 0] if device.type == "cuda" else 1, "strategy": "auto"}
    backend = process_group_backend()
    if backend == "gloo" and device.type == "cuda":
        # Told each process's GPU, Lightning does not ask for as many GPUs as there are processes.
        gpus = [gpu_of(process) for process in range(processes)]
        return {"devices": 1, "strategy": DDPStrategy(parallel_devices=gpus, process_group_backend=backend)}
    return {"devices": processes, "strategy": DDPStrategy(process_group_backend=backend or None)}


class _EpochKeeper(pl.Callback):
    """Seeds each epoch, keeps the history, the best weights and the checkpoint, and ends the training."""

    def __init__(
        self, folder: Path, module: RecipeTraining, recipe: TrainingRecipe, seed: int, deadline: Deadline | None
    ) -> None:
        self.folder, self.module, self.recipe, self.seed, self.deadline = folder, module, recipe, seed, deadline
        self.history: list[dict[str, float]] = []
        self.session: list[float] = []  # seconds of this session's epochs
        self.started = self.trained = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # What several processes draw, such as dropout, must differ between them.
        rank = data_parallel.share()[0]
        torch.manual_seed(derived_seed(self.seed, trainer.current_epoch, *([rank] if rank else [])))
        if self.recipe.schedule == "plateau":
            factor = plateau_factor([row["score"] for row in self.history], self.recipe)
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
        self.started = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            # Steps are only queued until then, and the rate would be too high.
            torch.cuda.synchronize(pl_module.device)
        self.trained = time.perf_counter()

    # The end of the training epoch and not of its validation, or Lightning would resume inside the epoch.
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not math.isfinite(logged.get("score", math.nan)):
            raise ValueError(f"epoch {trainer.current_epoch + 1}: no finite validation score; logged: {logged}")
        assert trainer.train_dataloader is not None  # the one that `fit` was given
        images = trainer.num_training_batches * trainer.train_dataloader.batch_sampler.batch_size
        self.session.append(time.perf_counter() - self.started)
        self.history.append(
            {
                "epoch": trainer.current_epoch + 1,
                "seconds": self.session[-1],
                "images_per_s": images / max(1e-9, self.trained - self.started),
                "learning_rate": max(group["lr"] for group in trainer.optimizers[0].param_groups),
                **logged,
            }
        )
        if trainer.is_global_zero:
            self._write(trainer)
        else:
            trainer.save_checkpoint(self.folder / "last.ckpt")  # takes part, and writes nothing
        # One decision for all processes, whose clocks differ.
        over = is_over(self.history, self.recipe) or not epoch_fits(self.deadline, self.session)
        trainer.should_stop = trainer.strategy.broadcast(over)
        logger.info("epoch %d of %d: score %.4f", len(self.history), self.recipe.epochs, self.history[-1]["score"])

    def _write(self, trainer: pl.Trainer) -> None:
        if kept_row(self.history, self.recipe) == len(self.history) - 1:
            state = self.module.judged.state_dict().items()
            weights = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state}
            with replacing(self.folder / "best.safetensors") as beside:
                save_file(weights, beside)
        with replacing(self.folder / "last.ckpt") as beside:
            trainer.save_checkpoint(beside)


class _Progress(pl.Callback):
    """One bar over all batches of a training, with the last epoch's loss and score."""

    def __init__(self, title: str, epochs: int) -> None:
        self.title, self.epochs = title, epochs

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = trainer.num_training_batches
        self.bar = tqdm(
            desc=self.title,
            total=steps * self.epochs,
            initial=steps * trainer.current_epoch,
            unit="batch",
            # Each refresh is a line of its own in a log file.
            mininterval=0.5 if sys.stderr.isatty() else 10,
            maxinterval=60,
        )

    def on_train_batch_end(self, *_: Any) -> None:
        self.bar.update()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shown: dict[str, str] = {
            name: f"{float(trainer.callback_metrics[name]):.3f}"
            for name in ("train_loss", "score")
            if name in trainer.callback_metrics
        }
        self.bar.set_postfix({"epoch": str(trainer.current_epoch + 1), **shown}, refresh=False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def _history(checkpoint: Path) -> list[dict[str, float]]:
    if not checkpoint.is_file():
        return []
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["callbacks"][_EpochKeeper.__qualname__]["history"]


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's notes about devices and tips, and its advice on workers; warnings of other kinds pass."""
    names = ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            # Lightning's loader asks torch for a name that torch has deprecated; neither side is ours.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)

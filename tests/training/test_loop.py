"""Schedules, early stopping, parameter groups, batches per step, and the moving average after a resume."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.plugins import MixedPrecision
from safetensors.torch import load_file

from kitlib.recipes.fields import FindingsRecipe
from kitlib.recipes.named import recipe
from kitlib.settings import override
from kitlib.training import loop as training
from kitlib.training import progress
from kitlib.training.fold_folder import find_kept_epoch, is_over
from kitlib.training.loop import (
    RecipeTraining,
    batches_per_step,
    fit,
    learning_rate_factor,
    make_optimizer,
    plateau_factor,
)
from tests.small_xrays import RECIPE

STEPWISE = override(RECIPE, schedule_every=0, warmup_epochs=0.0, epochs=10)
BACKBONE = recipe("heidelberg_backbone", FindingsRecipe)


def published(t, epochs):
    return 0.5 * (1 + math.cos(math.pi * t / epochs)) * 0.95 + 0.05  # Heidelberg report, equation 1


def test_the_schedule_is_the_published_one():
    # 1 at the start, 0.525 half-way, 0.05 at the end
    assert [learning_rate_factor(step, 100, STEPWISE) for step in (0, 50, 100)] == pytest.approx([1, 0.525, 0.05])
    assert learning_rate_factor(25, 100, STEPWISE) == pytest.approx(published(1, 4))


def test_warm_up_is_linear_and_the_cosine_takes_the_rest():
    warm = override(STEPWISE, epochs=6, warmup_epochs=1.0)  # of 24 steps, four
    assert [learning_rate_factor(step, 24, warm) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert learning_rate_factor(14, 24, warm) == pytest.approx(0.525)
    # With a single step after the warm-up, that step ends at the lowest rate.
    assert learning_rate_factor(4, 4, override(STEPWISE, epochs=4, warmup_epochs=3.0)) == pytest.approx(0.05)


def test_an_epochwise_schedule_is_a_staircase():
    # The published NIH training: 35 epochs. schedule_every=1 ends one step above the floor, 2 half-way.
    assert BACKBONE.epochs == 35 and BACKBONE.schedule_every == 1
    every_other = override(BACKBONE, schedule_every=2)
    for epoch in range(35):
        for step in (7 * epoch, 7 * epoch + 6):
            assert learning_rate_factor(step, 245, BACKBONE) == pytest.approx(published(epoch, 35))
            assert learning_rate_factor(step, 245, every_other) == pytest.approx(published(epoch // 2, 35))
    assert learning_rate_factor(244, 245, BACKBONE) == pytest.approx(0.05191, abs=1e-5)
    assert learning_rate_factor(244, 245, every_other) == pytest.approx(0.54631, abs=1e-5)  # t = 17


@pytest.mark.parametrize("an_epoch", [1, 7])
def test_a_step_schedule_falls_after_its_milestones(an_epoch):
    # UNet + HRNet paper, Table 5: a tenth at 30, 60 and 90; FLANNEL's: at 150 of 200.
    for epochs, milestones in ((100, (30, 60, 90)), (200, (150,))):
        stepped = override(RECIPE, schedule="step", milestones=milestones, epochs=epochs)
        for step in range(epochs * an_epoch):
            over = sum(step // an_epoch >= milestone for milestone in milestones)
            assert learning_rate_factor(step, epochs * an_epoch, stepped) == pytest.approx(0.1**over)
    assert learning_rate_factor(999, 1000, override(RECIPE, schedule="step")) == 1


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 5), st.integers(0, 4))
def test_the_learning_rate_stays_in_bounds_and_falls_after_the_warm_up(epochs, an_epoch, warmup_epochs, every):
    drawn = override(RECIPE, epochs=epochs, warmup_epochs=min(warmup_epochs, float(epochs)), schedule_every=every)
    steps = epochs * an_epoch
    factors = [learning_rate_factor(step, steps, drawn) for step in range(steps + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    warmup = round(steps * drawn.warmup_epochs / epochs)
    assert all(later <= earlier for earlier, later in zip(factors[warmup:], factors[warmup + 1 :], strict=False))


def rows(*scores):
    return [{"score": score} for score in scores]


@pytest.mark.parametrize(
    ("scores", "best", "over"),
    [
        ([0.1], 0, False),
        ([0.1, 0.3, 0.2], 1, False),
        ([0.3, 0.2, 0.2], 0, True),  # two epochs without a better score
        ([0.3, 0.3, 0.3], 0, True),  # equal is not better
        ([0.1, 0.2, 0.3, 0.4, 0.5], 4, True),  # epochs used up
    ],
)
def test_patience_and_epochs_end_a_training(scores, best, over):
    best_kept = override(RECIPE, epochs=5, patience=2)
    assert find_kept_epoch(rows(*scores), best_kept) == best
    assert is_over(rows(*scores), best_kept) is over
    # The last epoch is kept regardless of its score, and training never stops early.
    last = override(best_kept, keep="last")
    assert find_kept_epoch(rows(*scores), last) == len(scores) - 1
    assert is_over(rows(*scores), last) is (len(scores) == 5)


def test_biases_and_norms_do_not_decay_and_what_is_frozen_is_left_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, override(RECIPE, weight_decay=0.1))
    decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert len(decays) == 4 and decays[id(model[2].weight)] == 0.1
    assert decays[id(model[2].bias)] == decays[id(model[1].weight)] == 0
    model[2].bias = torch.nn.Parameter(torch.zeros(1, 2))  # whatever its shape
    groups = make_optimizer(model, override(RECIPE, weight_decay=0.1)).param_groups
    assert [len(group["params"]) for group in groups if group["weight_decay"] == 0] == [3]


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_an_optimizer_is_the_one_that_is_named(name, kind):
    optimizer = make_optimizer(torch.nn.Linear(2, 1), override(RECIPE, optimizer=name, learning_rate=0.01))
    assert type(optimizer) is kind and {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_momentum_is_the_recipes():
    for momentum in (0.8, 0.0):
        (group,) = make_optimizer(torch.nn.Linear(2, 1, bias=False), override(FLAT, momentum=momentum)).param_groups
        assert group["momentum"] == momentum and group["nesterov"] == (momentum > 0)


def test_adam_steps_as_kingma_and_ba_have_it():
    # Adam's algorithm 1 (2015) with weight decay added to the gradient, as Patched FLANNEL's code uses it.
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    optimizer = make_optimizer(layer, override(RECIPE, optimizer="adam", learning_rate=0.1, weight_decay=0.5))
    weight, first, second = 1.0, 0.0, 0.0
    for step in range(1, 6):
        optimizer.zero_grad()
        (layer(torch.ones(1, 1)) ** 2 / 2).sum().backward()
        optimizer.step()
        gradient = weight + 0.5 * weight
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight -= 0.1 * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        assert layer.weight.item() == pytest.approx(weight, rel=1e-5)


PLATEAU = override(RECIPE, schedule="plateau", plateau_epochs=1)


@pytest.mark.parametrize(
    ("scores", "factors"),
    [
        ([], [1]),
        ([0.1, 0.2, 0.3, 0.4], [1, 1, 1, 1, 1]),
        # The rate falls after the second epoch without a better score, and again two epochs later.
        ([0.5, 0.6, 0.6, 0.6, 0.6, 0.6], [1, 1, 1, 1, 0.1, 0.1, 0.01]),
        # A better score resets the count.
        ([0.5, 0.4, 0.6, 0.5, 0.7, 0.6, 0.6], [1, 1, 1, 1, 1, 1, 1, 0.1]),
        # Scores are compared with the best score so far, not with the previous score.
        ([0.9, 0.1, 0.2, 0.3], [1, 1, 1, 0.1, 0.1]),
    ],
)
def test_a_plateau_takes_a_tenth_of_the_rate(scores, factors):
    found = [plateau_factor(scores[:epochs], PLATEAU) for epochs in range(len(scores) + 1)]
    assert found == pytest.approx(factors)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), max_size=25), st.integers(0, 5))
def test_each_plateau_is_counted_from_the_previous_one(scores, patience):
    best, bad, factor = -math.inf, 0, 1.0
    for score in scores:
        best, bad = (score, 0) if score > best else (best, bad + 1)
        if bad > patience:
            factor, bad = factor / 10, 0
    # ReduceLROnPlateau does not change the rate by less than 1e-8.
    assert plateau_factor(scores, override(PLATEAU, plateau_epochs=patience)) == pytest.approx(max(factor, 1e-8), rel=1e-6)


class Staged(torch.nn.Module):
    """Model with a frozen backbone of two stages, each with its own rate, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("first", "last")})
        self.backbone.requires_grad_(False)
        self.head = torch.nn.Linear(2, 1)
        self.shares = {"backbone.": 0.1, "backbone.last.": 0.5}

    def rates(self):
        return self.shares


def test_a_network_may_set_rates_and_include_frozen_parameters():
    model = Staged()
    optimizer = make_optimizer(model, override(RECIPE, learning_rate=0.2, weight_decay=0.1))
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    rates = {name: groups[id(parameter)]["lr"] for name, parameter in model.named_parameters()}
    expected = {"backbone.first.": 0.02, "backbone.last.": 0.1, "head.": 0.2}
    assert rates == pytest.approx({start + end: rate for start, rate in expected.items() for end in ("weight", "bias")})
    assert groups[id(model.backbone["last"].bias)]["weight_decay"] == 0
    model.shares = {"neck.": 0.1}
    with pytest.raises(ValueError, match=r"Staged has no parameter whose name starts with 'neck\.'"):
        make_optimizer(model, RECIPE)
    with pytest.raises(ValueError, match="Linear has no parameter that is not frozen"):
        make_optimizer(torch.nn.Linear(2, 1).requires_grad_(False), RECIPE)


class Recorded(Exception):
    """Raised instead of training."""


@pytest.mark.parametrize(
    ("device", "processes", "backend", "expected"),
    [
        ("cpu", 1, "", {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true", "benchmark": False}),
        ("cuda:0", 1, "", {"accelerator": "gpu", "devices": [0], "strategy": "auto", "precision": "bf16-mixed"}),
        ("cuda:3", 1, "", {"accelerator": "gpu", "devices": [3], "strategy": "auto", "benchmark": True}),
        ("cuda", 1, "gloo", {"accelerator": "gpu", "devices": [0], "strategy": "auto"}),
        ("cpu", 2, "gloo", {"accelerator": "cpu", "devices": 2, "backend": "gloo", "gpus": None}),
        ("cuda:1", 2, "", {"accelerator": "gpu", "devices": 2, "backend": None, "gpus": None}),
        ("cuda:1", 2, "nccl", {"accelerator": "gpu", "devices": 2, "backend": "nccl", "gpus": None}),
        # With gloo, four processes share two GPUs.
        ("cuda:1", 4, "gloo", {"accelerator": "gpu", "devices": 1, "backend": "gloo", "gpus": ["cuda:0", "cuda:1"] * 2}),
    ],
)
def test_lightning_gets_device_precision_and_strategy(tmp_path, monkeypatch, device, processes, backend, expected):
    """Records the arguments of Lightning's Trainer, so that no GPU is needed."""
    recorded = {}

    def record(**arguments):
        recorded.update(arguments)
        raise Recorded

    monkeypatch.setattr(training.pl, "Trainer", record)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("KIT_PRECISION", "bf16-mixed"), ("KIT_BACKEND", backend), ("WORLD_SIZE", str(processes))):
        monkeypatch.setenv(name, value)
    chosen = override(FLAT, epochs=5, batch_size=2, nominal_batch=8)
    with pytest.raises(Recorded):
        fit(Slope(chosen), chosen, [], [], tmp_path, torch.device(device), seed=1)
    if processes > 1:
        strategy = recorded["strategy"]
        gpus = strategy.parallel_devices and [str(gpu) for gpu in strategy.parallel_devices]
        recorded |= {"backend": strategy.process_group_backend, "gpus": gpus}
    assert {name: recorded[name] for name in expected} == expected
    assert (recorded["max_epochs"], recorded["accumulate_grad_batches"]) == (5, 4)
    assert recorded["default_root_dir"] == tmp_path and len(recorded["callbacks"]) == 1
    # The kit itself writes checkpoints, the history and log lines, and splits batches among processes.
    switched_off = (
        "logger",
        "enable_checkpointing",
        "enable_progress_bar",
        "enable_model_summary",
        "use_distributed_sampler",
    )
    assert [recorded[name] for name in switched_off] == [False] * 5 and recorded["num_sanity_val_steps"] == 0
    assert recorded["gradient_clip_val"] is None  # the recipe's 0


@pytest.mark.parametrize(("batch", "nominal", "gathered"), [(16, 64, 4), (10, 0, 1), (16, 8, 1), (24, 64, 3), (8, 32, 4)])
def test_the_nominal_batch_is_rounded_to_whole_batches(batch, nominal, gathered):
    assert batches_per_step(override(RECIPE, batch_size=batch, nominal_batch=nominal)) == gathered


class Slope(RecipeTraining):
    """Model y = w x that records its weight before each training step, and the validated weight."""

    def __init__(self, recipe, dies_at=None):
        super().__init__(torch.nn.Linear(1, 1, bias=False), recipe)
        torch.nn.init.ones_(self.model.weight)
        if self.average is not None:
            self.average.set(self.model)
        self.dies_at, self.seen, self.judged_weights = dies_at, [], []

    def training_step(self, batch, number):
        if (self.current_epoch, number) == self.dies_at:
            raise ConnectionError("the session ended")
        self.seen.append(self.model.weight.item())
        return (self.model(batch).float() ** 2).mean() / 2  # in float32, as all of the kit's losses

    def on_validation_epoch_start(self):
        self.judged_weights.append(self.evaluated_model.weight.item())

    def validation_step(self, batch, _):
        assert not self.evaluated_model.training
        self.log("score", -(self.evaluated_model(batch) ** 2).mean())


def slope_batches(count, size=2):
    return torch.utils.data.DataLoader(torch.ones(count * size, 1), batch_size=size)


def train_slope(folder, recipe, count=6, dies_at=None):
    module = Slope(recipe, dies_at)
    return module, fit(module, recipe, slope_batches(count), slope_batches(1), folder, torch.device("cpu"), 0, False)


FLAT = override(RECIPE, optimizer="sgd", learning_rate=0.1, epochs=4, schedule_every=0)
GATHERED = {"nominal_batch": 4 * FLAT.batch_size}  # one optimiser step per four batches


def test_an_epochs_seconds_include_the_validation_and_its_images_per_second_do_not(tmp_path, monkeypatch, caplog):
    """A clock on which each of six training batches takes a second, and the validation six."""
    clock = SimpleNamespace(seconds=0.0, perf_counter=lambda: clock.seconds)
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(progress, "BETWEEN_LINES_S", 0.0)

    class Timed(Slope):
        def training_step(self, batch, number):
            clock.seconds += 1
            return super().training_step(batch, number)

        def validation_step(self, batch, number):
            clock.seconds += 6
            super().validation_step(batch, number)

    recipe = override(FLAT, epochs=2)
    with caplog.at_level("INFO", logger="kitlib"):
        fitted = fit(Timed(recipe), recipe, slope_batches(6), slope_batches(1), tmp_path, torch.device("cpu"), 0, False)
    times = fitted.history[["epoch", "seconds", "images_per_s"]].to_numpy().tolist()
    assert times == [[1, 12, 2], [2, 12, 2]]  # two images a batch
    lines = [line.partition(": ")[2] for line in caplog.messages if "batch" in line]
    assert lines == [f"epoch {epoch} of 2, batch {batch} of 6" for epoch in (1, 2) for batch in range(1, 7)]


def test_an_incomplete_group_of_batches_steps_at_the_epochs_end_and_counts_by_its_images(tmp_path):
    # By hand: the gradient of a batch of ones is w; Nesterov SGD 0.9; groups of 4 and 2 of the 6 batches, each over 4.
    module, _ = train_slope(tmp_path, override(FLAT, epochs=2, **GATHERED))
    weight, momentum, expected = 1.0, 0.0, []
    for step, batches in enumerate((4, 2, 4, 2)):
        expected += [weight] * batches
        gradient = weight * batches / 4
        momentum = 0.9 * momentum + gradient
        weight -= 0.1 * learning_rate_factor(step, 4, override(FLAT, epochs=2)) * (gradient + 0.9 * momentum)
    assert module.seen == pytest.approx(expected, rel=1e-5)


def test_the_moving_average_follows_its_formula_and_is_what_is_judged_and_kept(tmp_path):
    module, fitted = train_slope(tmp_path, override(FLAT, ema_decay=0.6), count=5)
    after = [*module.seen[1:], None]  # the weight after each of the 20 steps but the last
    average, judged = 1.0, []
    for step in range(1, 20):
        decay = min(0.6, 1 - step**-0.75)
        average = decay * average + (1 - decay) * after[step - 1]
        if step % 5 == 0:
            judged.append(average)
    assert module.judged_weights[:3] == pytest.approx(judged, rel=1e-5)
    best = module.judged_weights[fitted.best_epoch - 1]
    assert module.model.weight.item() == load_file(tmp_path / "checkpoints" / "best.safetensors")["weight"].item() == best
    assert fitted.best()["score"] == pytest.approx(-(best**2), rel=1e-5)
    with pytest.raises(ValueError, match=r"ema_decay is 1\.0"):
        Slope(override(FLAT, ema_decay=1.0))


@pytest.mark.parametrize("dies_at", [(0, 3), (2, 0), (3, 4)])
def test_a_resumed_moving_average_with_gathered_batches_equals_an_uninterrupted_one(tmp_path, dies_at):
    averaged = override(FLAT, ema_decay=0.9, **GATHERED)
    whole, fitted = train_slope(tmp_path / "whole", averaged)
    with pytest.raises(ConnectionError):
        train_slope(tmp_path / "cut", averaged, dies_at=dies_at)
    resumed, again = train_slope(tmp_path / "cut", averaged)
    # Epochs after the interruption: the last checkpoint before it holds the average, its step and the momentum.
    assert resumed.judged_weights == whole.judged_weights[-len(resumed.judged_weights) :]
    assert len(resumed.judged_weights) == 4 - dies_at[0]
    assert again.history.score.tolist() == fitted.history.score.tolist()
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_half_precision_leaves_weights_and_average_in_full(tmp_path, monkeypatch):
    # Precision bf16-mixed on the CPU: Lightning autocasts, and the kit's own code must not cast weights.
    monkeypatch.setattr(training, "precision", lambda _: "bf16-mixed")
    module, _ = train_slope(tmp_path, override(FLAT, ema_decay=0.9))
    assert module.model.weight.dtype == module.evaluated_model.weight.dtype == torch.float32
    assert module.judged_weights[-1] < module.judged_weights[0] < 1
    full, _ = train_slope(tmp_path / "full", override(FLAT, ema_decay=0.9))
    assert module.judged_weights == pytest.approx(full.judged_weights, abs=0.02)


def test_gradients_are_accumulated_unscaled_and_clipped_and_steps_with_an_overflow_are_skipped(tmp_path, monkeypatch):
    # float16 on the CPU with a gradient scaler, as on a T4; Lightning itself would choose bfloat16 on a CPU.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = training.pl.Trainer
    monkeypatch.setattr(training.pl, "Trainer", lambda precision, **options: trainer(plugins=[plugin], **options))
    clipped = override(FLAT, epochs=2, gradient_clip=0.5, **GATHERED)
    module, _ = train_slope(tmp_path, clipped)
    # By hand as above. A batch's first gradient, 2^18 w / 4, exceeds float16's 65,504: no step, and half of the scale.
    weight, momentum, expected = 1.0, 0.0, []
    for step, batches in enumerate((4, 2, 4, 2)):
        expected += [weight] * batches
        if step > 0:
            gradient = min(weight * batches / 4, 0.5)
            momentum = 0.9 * momentum + gradient
            weight -= 0.1 * learning_rate_factor(step, 4, override(FLAT, epochs=2)) * (gradient + 0.9 * momentum)
    assert module.seen == pytest.approx(expected, rel=1e-3)
    assert scaler.get_scale() == 2.0**17
    assert module.model.weight.dtype == torch.float32


STEPPED = override(FLAT, schedule="step", milestones=(1, 3), step_factor=0.5, momentum=0.8)


def test_a_resumed_step_schedule_equals_an_uninterrupted_one_and_its_closed_form(tmp_path):
    whole, fitted = train_slope(tmp_path / "whole", STEPPED)
    # By hand: the gradient of w^2 / 2 is w; Nesterov SGD 0.8; half the rate after one epoch, a quarter after three.
    weight, momentum, expected = 1.0, 0.0, []
    for rate in (0.1, 0.05, 0.05, 0.025):
        for _ in range(6):
            expected.append(weight)
            momentum = 0.8 * momentum + weight
            weight -= rate * (expected[-1] + 0.8 * momentum)
    assert whole.seen == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for number, dies_at in enumerate([(1, 0), (3, 2)]):
        with pytest.raises(ConnectionError):
            train_slope(tmp_path / str(number), STEPPED, dies_at=dies_at)
        resumed, again = train_slope(tmp_path / str(number), STEPPED)
        assert torch.equal(resumed.model.weight, whole.model.weight)
        assert again.history.learning_rate.tolist() == fitted.history.learning_rate.tolist()


class FixedScores(Slope):
    """Training module whose validation logs fixed scores."""

    scores = (0.5, 0.6, 0.6, 0.4, 0.6, 0.5)

    def validation_step(self, batch, _):
        self.log("score", self.scores[self.current_epoch])


def train_fixed_scores(folder, dies_at=None):
    recipe = override(FLAT, epochs=6, schedule="plateau", plateau_epochs=1, patience=10)
    module = FixedScores(recipe, dies_at)
    return module, fit(module, recipe, slope_batches(5), slope_batches(1), folder, torch.device("cpu"), 0, False)


def test_a_plateaus_rate_is_that_of_the_next_epoch(tmp_path):
    module, fitted = train_fixed_scores(tmp_path)
    rates = [0.1, 0.1, 0.1, 0.1, 0.01, 0.01]  # epochs 3 and 4 were no better than the second
    assert fitted.history.learning_rate.tolist() == pytest.approx(rates)
    # By hand: the gradient of w^2 / 2 is w; Nesterov SGD 0.9.
    weight, momentum, expected = 1.0, 0.0, []
    for rate in rates:
        for _ in range(5):
            expected.append(weight)
            gradient, momentum = weight, 0.9 * momentum + weight
            weight -= rate * (gradient + 0.9 * momentum)
    assert module.seen == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dies_at", [(0, 3), (3, 0), (4, 2), (5, 4)])
def test_a_resumed_plateau_equals_an_uninterrupted_one(tmp_path, dies_at):
    whole, fitted = train_fixed_scores(tmp_path / "whole")
    with pytest.raises(ConnectionError):
        train_fixed_scores(tmp_path / "cut", dies_at)
    resumed, again = train_fixed_scores(tmp_path / "cut")
    assert again.history.learning_rate.tolist() == fitted.history.learning_rate.tolist()
    assert resumed.seen == whole.seen[-len(resumed.seen) :] and len(resumed.seen) == 5 * (6 - dies_at[0])
    assert torch.equal(resumed.model.weight, whole.model.weight)

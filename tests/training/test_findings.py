"""Findings classifiers: outputs of a run, loss, unknown labels, exclusive classes, test images, exact resume, errors."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from kitlib.bundle import read_bundle
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import DatasetError, TrainingError
from kitlib.models.classifier import FindingsClassifier, StudyClassifier
from kitlib.models.starting_weights import load_starting_weights
from kitlib.recipes.fields import FindingsRecipe, StudyRecipe
from kitlib.recipes.named import RECIPES
from kitlib.scoring.metrics import CALL_METRICS, class_weights, exclusive_scores, mean_auc
from kitlib.settings import override
from kitlib.tables import read_table
from kitlib.training.findings import FindingsTraining, findings_loss, unseen_test_images
from kitlib.training.fold_folder import NOT_METRICS
from kitlib.training.loop import learning_rate_factor
from tests.small_lungs import stored_lungs
from tests.small_tasks import train_small
from tests.small_xrays import SmallXrays

TIMES = ["seconds", "images_per_s"]
FINDINGS = ["Mass", "No Finding"]
RECIPE = FindingsRecipe(
    backbone="test_resnet",
    channels=1,
    image_size=32,
    placement="letterbox",
    epochs=3,
    batch_size=4,
    optimizer="adamw",
    learning_rate=1e-3,
    hidden=16,
    rotate_degrees=0.0,
    blur_p=0.0,
    erase_p=0.0,
)


class SmallFindings(SmallXrays):
    """Data set with two opposite findings per study, of which one is true; the last patient's images are test images."""

    def __post_init__(self):
        super().__post_init__()
        mass = (self.labels[list(STUDY_CLASSES)].to_numpy() @ [0, 0, 1, 1]).astype(float)
        self.labels = pd.DataFrame({"id": self.labels["id"], "Mass": mass, "No Finding": 1 - mass})
        last = self.images.patient_id == self.images.patient_id.iloc[-1]
        self.images = self.images.assign(split=np.where(last, "test", "train"))
        self.fold_table = self.fold_table[~self.fold_table.id.isin(self.images.image_id[last])].reset_index(drop=True)


def train(folder, small=None, recipe=RECIPE, **options):
    return train_small(folder, small or SmallFindings(32), recipe, **{"model_name": "nih"} | options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"))


@pytest.mark.gpu
def test_a_run_leaves_a_bundle_and_the_scores_of_unseen_images(uninterrupted):
    small, folder = SmallFindings(32), uninterrupted.run_folder
    scores = read_table("class_scores", folder / "tables" / "class_scores.parquet")
    assert set(scores.image_id) == set(small.fold_table.id[small.fold_table.fold == 1])
    assert scores.columns.tolist() == ["image_id", "model", "fold", *FINDINGS]
    assert set(scores.model) == {"nih"} and set(scores.fold) == {1}
    test = read_table("class_scores", folder / "tables" / "test_scores.parquet")
    assert test.image_id.tolist() == small.image_ids[-4:] and test.columns.tolist() == scores.columns.tolist()
    record, weights = read_bundle(folder / "bundle")
    assert record["family"] == "findings" and record["classes"] == FINDINGS
    assert weights["head.3.weight"].shape == (2, 16)
    metrics = uninterrupted.metrics
    assert (metrics["train_images"], metrics["validation_images"], metrics["test_images"]) == (16, 12, 4)
    assert record["validation"] == {name: metrics["best"][name] for name in ("score", *FINDINGS)}
    assert (folder / "figures" / "curves.png").is_file()


def test_the_out_of_fold_table_has_the_score_that_chose_the_epoch(uninterrupted):
    # Prediction is independent of validation: it loads the bundle from disk and draws its own canvases.
    small, scores = SmallFindings(32), uninterrupted.tables["class_scores"]
    studies = small.images.set_index("image_id").study_id[scores.image_id]
    truth = small.labels.set_index("id").loc[studies, FINDINGS].to_numpy()
    found = mean_auc(truth, scores[FINDINGS].to_numpy(), FINDINGS)
    assert found == pytest.approx({name: uninterrupted.metrics["best"][name] for name in found}, abs=1e-6)


@pytest.mark.gpu
def test_training_learns_and_a_study_classifier_starts_from_the_bundle(tmp_path):
    # The classes are grey levels: images of unseen patients must be classified almost perfectly.
    learnt = train(tmp_path / "learnt", recipe=override(RECIPE, epochs=8, learning_rate=1e-2, batch_size=8))
    assert learnt.metrics["best"]["score"] > 0.9  # chance is 0.5
    study = StudyClassifier(StudyRecipe(backbone="test_resnet", image_size=32, hidden=16))
    report = load_starting_weights(study, tmp_path / "learnt" / "bundle")
    assert all(name.startswith("head.") for name in report["random"])
    weights = read_bundle(tmp_path / "learnt" / "bundle")[1]
    assert all(torch.equal(weights[f"backbone.{name}"], each) for name, each in study.backbone.state_dict().items())
    again = train(
        tmp_path / "again", recipe=override(RECIPE, epochs=1, starting_weights=str(tmp_path / "learnt" / "bundle"))
    )
    assert again.metrics["starting_weights"].endswith(f"bundle: {len(weights)} tensors, 0 left random")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.9},
        {"nominal_batch": 8, "schedule_every": 1, "optimizer": "sgd", "learning_rate": 0.05},
    ],
    ids=["mixed", "gathered"],
)
def test_every_option_of_training_learns(tmp_path, changes):
    recipe = override(RECIPE, **{"epochs": 8, "learning_rate": 1e-2, "dropout": 0.0} | changes)
    assert train(tmp_path, recipe=recipe).metrics["best"]["score"] > 0.8  # chance is 0.5


def test_the_backbone_learns_at_the_published_rates(tmp_path):
    # Heidelberg report, eq. 1, a step an epoch: (0.5 (1 + cos(pi t / T)) 0.95 + 0.05) 1e-3. The history has the rate at an
    # epoch's end, when the next one's is set: t = 1, 2, 3 of T = 3, cosines 1/2, -1/2, -1.
    published = RECIPES["heidelberg_backbone"]
    assert (published.learning_rate, published.optimizer, published.schedule_every) == (1e-3, "sgd", 1)
    rates = {"learning_rate": published.learning_rate, "optimizer": published.optimizer, "schedule_every": 1}
    history = train(tmp_path, recipe=override(RECIPE, **rates), limit_train=12).history
    assert history.learning_rate.tolist() == pytest.approx([0.7625e-3, 0.2875e-3, 0.05e-3])
    # 35 epochs, the last one at t = 34: 0.5 (1 + cos(34 pi / 35)) = 0.00201
    assert learning_rate_factor(0, 35 * 10, published) == 1
    assert learning_rate_factor(35 * 10 - 1, 35 * 10, published) == pytest.approx(0.05 + 0.95 * 0.00201, abs=1e-5)


@pytest.mark.gpu
def test_exclusive_classes_have_probabilities_that_sum_to_one(tmp_path):
    run = train(tmp_path, recipe=override(RECIPE, multi_label=False, epochs=1))
    assert run.tables["class_scores"][FINDINGS].sum(axis=1).to_numpy() == pytest.approx(np.ones(12), abs=1e-6)
    several = SmallFindings(32)
    several.labels.loc[0, FINDINGS] = 1.0
    with pytest.raises(
        ValueError, match=r'1 rows of the table `labels` do not sum to 1; the first is for study000\. .*"multi_label": true'
    ):
        train(tmp_path / "several", several, recipe=override(RECIPE, multi_label=False))


EXCLUSIVE = override(
    RECIPE, multi_label=False, judged_by="macro_f1", hidden=0, dropout=0.0, epochs=8, learning_rate=1e-2, batch_size=8
)


@pytest.mark.gpu
def test_a_learner_of_exclusive_classes_learns_and_predicts_its_training_images_on_request(tmp_path):
    small = SmallFindings(32)
    recipe = override(EXCLUSIVE, epochs=20, patience=20, one_logit=True, class_weights=True, normalisation="half", l1=1e-5)
    run = train(tmp_path, small, recipe, in_sample=True)
    assert run.metrics["best"]["score"] > 0.7  # a constant prediction scores at most 0.4, chance 0.5
    assert run.tables["class_scores"][FINDINGS].sum(axis=1).to_numpy() == pytest.approx(np.ones(12), abs=1e-6)
    assert set(run.tables["training_scores"].image_id) == set(small.fold_table.id[small.fold_table.fold != 1])
    assert not set(run.tables["training_scores"].image_id) & set(run.tables["class_scores"].image_id)
    assert run.metrics["classes_without_images"] == {"training": [], "validation": []}
    # The kept epoch's score is recomputed from the table: an image's class is the most probable class.
    studies = small.images.set_index("image_id").study_id[run.tables["class_scores"].image_id]
    truth = small.labels.set_index("id").loc[studies, FINDINGS].to_numpy()
    again = exclusive_scores(truth, run.tables["class_scores"][FINDINGS].to_numpy(), FINDINGS, "macro_f1")
    assert again == pytest.approx({name: run.metrics["best"][name] for name in again}, abs=1e-6)
    # A finished run adds a table that is requested later.
    (tmp_path / "tables" / "training_scores.parquet").unlink()
    assert "training_scores" not in train(tmp_path, small, recipe).tables
    pd.testing.assert_frame_equal(
        train(tmp_path, small, recipe, in_sample=True).tables["training_scores"], run.tables["training_scores"]
    )


def test_the_validation_loss_has_neither_smoothing_nor_penalty(tmp_path, monkeypatch):
    """It is the cross-entropy of the predictions that the run writes; with smoothing by 0.4 it would not be.

    The training loss is the mean over the epoch's batches, without the penalty.
    """
    small, batch_losses = SmallFindings(), []
    loss = FindingsTraining.training_loss

    def noted(training, batch):
        batch_losses.append(loss(training, batch))
        return batch_losses[-1]

    monkeypatch.setattr(FindingsTraining, "training_loss", noted)
    run = train(tmp_path, small, override(RECIPE, epochs=1, label_smoothing=0.4, l1=0.01))
    scores = run.tables["class_scores"]
    study_of = small.images.set_index("image_id").study_id
    truth = small.labels.set_index("id").loc[study_of[scores.image_id], FINDINGS].to_numpy()
    predicted = scores[FINDINGS].to_numpy()
    losses = -(truth * np.log(predicted) + (1 - truth) * np.log(1 - predicted))
    assert run.history.validation_loss.item() == pytest.approx(losses.mean(), rel=1e-3)
    assert run.history.train_loss.item() == pytest.approx(np.mean([each.item() for each in batch_losses]), rel=1e-5)
    assert len(batch_losses) == 4
    # The columns of the stored history, which later stages read.
    columns = [*NOT_METRICS, "train_loss", "validation_loss", "score", *FINDINGS, *CALL_METRICS]
    assert sorted(run.history.columns) == sorted(columns)
    assert run.metrics["lungs_missed"] == {"training": 0, "predicted": 0}


def test_a_class_without_images_is_reported_and_left_out_of_the_score(tmp_path):
    small = SmallFindings(32)
    small.labels["Edema"] = 0.0  # no image has it
    recipe = override(EXCLUSIVE, epochs=1, class_weights=True)
    run = train(tmp_path, small, recipe)
    metrics = run.metrics
    assert metrics["classes_without_images"] == {"training": ["Edema"], "validation": ["Edema"]}
    assert np.isfinite(metrics["best"]["score"]) and run.history.Edema.isna().all()


def test_settings_that_do_not_fit_the_classes_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"judged_by='macro_f1' can be used only if .* set multi_label=False"):
        train(tmp_path, recipe=override(RECIPE, judged_by="macro_f1"))
    small = SmallFindings(32)
    small.labels["Edema"] = 0.0
    with pytest.raises(ValueError, match="one_logit needs 2 classes, but there are 3"):
        train(tmp_path, small, recipe=override(EXCLUSIVE, one_logit=True))
    assert not list(tmp_path.iterdir())


class OneBatch:
    """Fake validation data set with the labels of four images."""

    label = np.eye(2)[[0, 1, 1, 1]]

    def __len__(self):
        return 4


def test_the_loss_of_a_batch_has_its_weights_its_auxiliary_head_and_its_penalty(monkeypatch):
    torch.manual_seed(0)
    model = FindingsClassifier(override(EXCLUSIVE, l1=0.25), FINDINGS)
    training = FindingsTraining(model, OneBatch(), class_weights(OneBatch.label))
    monkeypatch.setattr(training, "log", lambda *_, **__: None)
    batch = {"pixels": torch.randint(0, 256, (4, 32, 32), dtype=torch.uint8), "label": torch.tensor(OneBatch.label).float()}
    assert "weights" not in training.state_dict()  # they follow from the data
    model.eval()
    logits = model(model.normalise(batch["pixels"]))
    # Weights 4 / (2 x 1) and 4 / (2 x 3); the mean over the four images.
    each = functional.cross_entropy(logits, torch.tensor([0, 1, 1, 1]), reduction="none")
    data = (2 * each[0] + each[1:].sum() * 2 / 3) / 4
    torch.testing.assert_close(training.training_loss(batch), data)
    weights = sum(each.abs().sum() for each in model.parameters())
    torch.testing.assert_close(training.training_step(batch, 0), data + 0.25 * weights)
    with monkeypatch.context() as patch:
        patch.setattr(model, "with_auxiliary", lambda x: (model(x), torch.zeros(4, 2)), raising=False)
        patch.setattr(
            training, "recipe", override(FindingsRecipe(backbone="inception_v3", multi_label=False), auxiliary=0.4)
        )
        # A second head with zero logits has a loss of log 2 per image, and weights are 1 on average.
        torch.testing.assert_close(training.training_loss(batch), data + 0.4 * np.log(2))


@pytest.mark.parametrize("judged_by", ["auc", "macro_f1", "accuracy"])
def test_nan_predictions_give_a_nan_score(judged_by):
    training = FindingsTraining(FindingsClassifier(override(EXCLUSIVE, judged_by=judged_by), FINDINGS), OneBatch())
    training.validation_probabilities = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert training.scores()["score"] == 1
    training.validation_probabilities[2] = np.nan  # one NaN is enough
    assert np.isnan(training.scores()["score"])


def test_a_class_is_called_if_it_is_likely_or_of_exclusive_classes_the_most_likely():
    scores = {}
    for multi_label in (True, False):
        recipe = override(EXCLUSIVE, multi_label=multi_label, judged_by="auc")
        training = FindingsTraining(FindingsClassifier(recipe, FINDINGS), OneBatch())
        training.validation_probabilities = np.array([[0.5, 0.1], [0.1, 0.5], [0.2, 0.4], [0.3, 0.4]])
        scores[multi_label] = training.scores()["recall"]
    # Two of four images have a class of at least 0.5; the most likely class is always right.
    assert scores == {True: pytest.approx((1 + 1 / 3) / 2), False: 1}


def test_at_most_as_many_test_images_are_predicted_as_the_limit():
    images = SmallFindings(32).images
    test = images[images.split == "test"]
    assert unseen_test_images(images, images[:4], limit=3).image_id.tolist() == test.image_id.tolist()[:3]
    assert unseen_test_images(images, images[:4]).image_id.tolist() == test.image_id.tolist()
    assert unseen_test_images(images.drop(columns="split"), images[:4]).empty


def test_images_with_unknown_labels_are_trained_on_and_not_counted(tmp_path):
    small = SmallFindings(32)
    small.labels.loc[::3, "Mass"] = np.nan
    run = train(tmp_path, small, recipe=override(RECIPE, epochs=1))
    scores = run.tables["class_scores"]
    scores = scores.assign(study_id=scores.image_id.map(small.images.set_index("image_id").study_id))
    truth = small.labels.set_index("id").loc[scores.study_id, FINDINGS].to_numpy()
    assert np.isnan(truth).any()
    assert mean_auc(truth, scores[FINDINGS].to_numpy(), FINDINGS)["Mass"] == pytest.approx(run.metrics["best"]["Mass"])


def test_an_interrupted_run_ends_as_an_uninterrupted_one_and_another_is_refused(tmp_path, monkeypatch, uninterrupted):
    step = FindingsTraining.training_step

    def dying(self, batch, number):
        if (self.current_epoch, number) == (1, 2):
            raise ConnectionError("the session ended")
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(FindingsTraining, "training_step", dying)
        with pytest.raises(ConnectionError):
            train(tmp_path)
    torch.manual_seed(12345)
    resumed = train(tmp_path)
    pd.testing.assert_frame_equal(resumed.tables["class_scores"], uninterrupted.tables["class_scores"], check_exact=True)
    pd.testing.assert_frame_equal(resumed.tables["test_scores"], uninterrupted.tables["test_scores"], check_exact=True)
    pd.testing.assert_frame_equal(
        resumed.history.drop(columns=TIMES), uninterrupted.history.drop(columns=TIMES), check_exact=True
    )
    monkeypatch.setattr("kitlib.training.strategy.fit", lambda *_, **__: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(train(tmp_path).tables["class_scores"], resumed.tables["class_scores"])
    with pytest.raises(TrainingError, match=r"recipe\.dropout"):
        train(tmp_path, recipe=override(RECIPE, dropout=0.1))


def test_test_images_of_trained_patients_are_not_predicted(tmp_path, caplog):
    small = SmallFindings(32)
    # The first test image now belongs to a patient of fold 0, which is trained on.
    small.images.loc[28, "patient_id"] = "patient000"
    with caplog.at_level("WARNING"):
        run = train(tmp_path, small, recipe=override(RECIPE, epochs=1))
    assert run.tables["test_scores"].image_id.tolist() == small.image_ids[29:]
    assert "1 test images are not predicted, because the model is trained on other images of their patients" in caplog.text
    assert "the first is image028" in caplog.text


def test_an_untrainable_task_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r'test_resnet would stay random.*"frozen_backbone": false'):
        train(tmp_path, recipe=override(RECIPE, frozen_backbone=True))
    leaking = SmallFindings(32)
    leaking.fold_table = SmallXrays(32).fold_table
    with pytest.raises(ValueError, match="4 images in the split 'test' are in folds; the first is image028"):
        train(tmp_path, leaking)
    assert not list(tmp_path.iterdir())


def test_a_data_set_without_test_images_has_no_test_scores(tmp_path):
    small = SmallFindings(32)
    small.images = small.images.drop(columns="split")
    run = train(tmp_path, small, recipe=override(RECIPE, epochs=1), limit_train=8, limit_validation=13, seed=1)
    # whole patients of four images
    assert run.metrics["train_images"] == 8 and len(run.tables["class_scores"]) == 12
    assert run.tables["test_scores"].empty and run.metrics["test_images"] == 0


@pytest.mark.parametrize("multi_label", [True, False])
def test_unknown_labels_do_not_touch_the_loss(multi_label):
    torch.manual_seed(0)
    logits, label = torch.randn(4, 3), torch.eye(3)[[0, 1, 2, 0]]
    known = findings_loss(logits[:2], label[:2], multi_label)
    label[2:] = torch.nan
    assert torch.equal(findings_loss(logits, label, multi_label), known)
    reference = functional.binary_cross_entropy_with_logits if multi_label else functional.cross_entropy
    torch.testing.assert_close(known, reference(logits[:2], label[:2]))
    logits.requires_grad_()
    nothing = findings_loss(logits, torch.full((4, 3), torch.nan), multi_label)
    nothing.backward()
    assert nothing == 0 and torch.equal(logits.grad, torch.zeros(4, 3))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), multi_label=st.booleans(), step=st.floats(0.1, 3))
def test_a_better_prediction_costs_less(seed, multi_label, step):
    torch.manual_seed(seed)
    logits, label = torch.randn(3, 4), torch.eye(4)[torch.randint(0, 4, (3,))]
    better = logits + step * (2 * label - 1)
    assert findings_loss(better, label, multi_label) < findings_loss(logits, label, multi_label)


@pytest.mark.parametrize("multi_label", [True, False])
def test_smoothing_is_cheapest_at_the_smoothed_truth(multi_label):
    # A quarter spread over true and false leaves 7/8; over four classes 13/16 for the true one and 1/16 for each other.
    expected = torch.tensor([[7 / 8, 1 / 8, 1 / 8, 1 / 8]]) if multi_label else torch.tensor([[13 / 16, *[1 / 16] * 3]])
    logits = (expected.logit() if multi_label else expected.log()).requires_grad_()
    findings_loss(logits, torch.eye(4)[:1], multi_label, smoothing=0.25).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(1, 4), atol=1e-6, rtol=0)


@pytest.mark.gpu
def test_a_backbone_of_lung_crops_scores_validation_and_test_images_on_theirs(tmp_path):
    small, recipe = SmallFindings(32), override(RECIPE, epochs=1, lungs="masks", trained_on="lungs", views=["lungs"])
    test = small.image_ids[-1]
    lungs = stored_lungs(tmp_path / "lungs", small, missed=[test])
    run = train(tmp_path / "run", small, recipe, lungs=lungs)
    assert run.metrics["lungs_missed"] == {"training": 0, "predicted": 1}
    assert run.metrics["lungs_fingerprint"] == lungs.fingerprint and test in set(run.tables["test_scores"].image_id)
    with pytest.raises(ValueError, match=r"nih: .*set lungs_run"):
        train(tmp_path / "refused", small, recipe)
    with pytest.raises(TrainingError, match="lungs_fingerprint"):
        train(tmp_path / "run", small, recipe, lungs=stored_lungs(tmp_path / "other", small))


@pytest.mark.parametrize("multi_label", [True, False])
def test_training_images_with_the_same_labels_are_refused(tmp_path, multi_label):
    """Any model would be right for every image, so that the figures would be perfect."""
    small, recipe = SmallFindings(), override(RECIPE, multi_label=multi_label)
    small.labels = small.labels.assign(**{"Mass": 1.0, "No Finding": 0.0})
    # The fold that is validated on has the other half of the images; the limit leaves a patient of one class.
    with pytest.raises(DatasetError, match=r"all 16 training images have the same labels \(Mass\).* `pool` in notebook 10"):
        train(tmp_path, small, recipe)
    with pytest.raises(DatasetError, match=r"all 4 training images .* raise `limit_train`, which is 4"):
        train(tmp_path, SmallFindings(), recipe, limit_train=4)
    small.labels = small.labels[["id"]]
    with pytest.raises(DatasetError, match="the prepared run has no labels; in notebook 10, give `label`"):
        train(tmp_path, small, recipe)
    assert not list(tmp_path.iterdir())


def test_class_weights_keep_their_digits_under_autocast():
    # Of one image with a certain prediction the loss is the weight times ln 2, which float16 and bfloat16 would round.
    weights, label = torch.tensor([1.2345678, 0.7654321]), torch.eye(2)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            losses = [findings_loss(torch.zeros(1, 2), row[None], False, weights=weights) for row in label]
        torch.testing.assert_close(torch.stack(losses), weights * np.log(2), rtol=1e-6, atol=0)

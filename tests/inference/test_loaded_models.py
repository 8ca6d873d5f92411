"""Which predictions of loaded models are combined and how, what stays loaded, and what is said of models that fail."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.vinbigdata import VINBIGDATA
from kitlib.fusion.ensemble_bundle import Ensemble, write_ensemble
from kitlib.inference import cached_lungs, loaded_models
from kitlib.inference.loaded_models import BATCH_SIZE, Answer, LoadedModels
from kitlib.inference.predict_files import FILE_TIMEOUT_S
from kitlib.inference.submit import SubmitSettings
from kitlib.inference.systems import System
from kitlib.lungs.finders import Lungs
from kitlib.tables import BOX
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.mask_store import encode_grey
from tests.small_systems import describe_model

IMAGES = pd.DataFrame({"image_id": ["a", "b"], "study_id": ["s", "t"], "rows": 80, "columns": 60})
XRAYS = [CachedXray(name, np.zeros((8, 6), np.uint8), 80, 60) for name in IMAGES.image_id]


class Predictor:
    """Yields the given tables for the images `seen`, then raises `error` unless it is None; `read` has what it was given."""

    def __init__(self, model, *tables, fold=0, seen=("a", "b"), missed=0, error=None):
        self.model, self.fold, self.tables, self.error = model, fold, tables, error
        self.seen, self.lungs_missed, self.read = list(seen), missed, []

    def predict(self, xrays):
        self.read.append([xray.image_id for xray in xrays])
        yield from self.tables
        if self.error:
            raise self.error


@pytest.fixture
def ask(monkeypatch):
    """A function that returns the Answer of a System with the given models and keyword arguments.

    Each model is a tuple: its Predictor, what it answers, and further arguments of `describe_model`. The function's `models`
    are the LoadedModels, `system` is the latest system, and `loads` lists what was loaded: folder, batch size and lungs.
    """
    models, predictors, loads = LoadedModels(), {}, []

    def load(folder, batch_size, lungs):
        loads.append((folder.name, batch_size, lungs))
        if lungs is not None:
            lungs.begin()
        return predictors[folder.name]

    def answer(*given, **keys):
        described = []
        for predictor, answers, more in given:
            described.append(describe_model(predictor.model, *answers, fold=predictor.fold, **more))
            predictors[described[-1].folder.name] = predictor
        answer.system = System("small", tuple(described), **keys)
        return models.answer(answer.system, answer.system.models, lambda: iter(XRAYS), IMAGES)

    monkeypatch.setattr(loaded_models, "load_predictor", load)
    answer.models, answer.loads = models, loads
    return answer


def study_scores(model, image_id, *probabilities):
    """Return a study model's prediction for one image; its `none` is 0.5."""
    columns = ["image_id", "model", "fold", *STUDY_CLASSES, "none"]
    return pd.DataFrame([[image_id, model, 0, *probabilities, 0.5]], columns=columns)


def class_scores(model, fold=0, **probabilities):
    """Return a classifier's predictions: for each image the probability of "ill", and the rest of "well"."""
    rows = [[name, model, fold, p, 1 - p] for name, p in probabilities.items()]
    return pd.DataFrame(rows, columns=["image_id", "model", "fold", "ill", "well"])


STUDIES = [study_scores("study", "a", 0.8, 0.2, 0, 0), study_scores("study", "b", 0, 0, 1, 0)]


def test_a_system_predicts_with_the_models_that_work_and_tells_of_the_others(ask):
    columns = ["image_id", "model", "fold", "finding", "score", *BOX]
    found = pd.DataFrame([["a", "boxes", 1, "opacity", 0.9, 10.0, 10.0, 40.0, 50.0]], columns=columns)
    study, boxes = Predictor("study", *STUDIES), Predictor("boxes", found, fold=1, seen=["a"], missed=1)
    broken = Predictor("broken", STUDIES[0], fold=2, error=ValueError("no memory"))
    given = [(study, ("study", "none"), {}), (boxes, ("boxes",), {"classes": ("opacity",)}), (broken, ("study", "none"), {})]
    answer = ask(*given, notes=("of the run",))
    assert answer.models[["model", "fold"]].to_numpy().tolist() == [["study", 0], ["boxes", 1]]
    assert answer.models.seconds.between(0, 60).all()
    fault = "broken (fold 2) failed and is left out: ValueError: no memory."
    missed = "boxes used 1 images uncropped, because no lungs were found."
    assert (answer.remarks, answer.faults) == (("of the run", missed, fault), (fault,))
    # What the broken model has predicted before its error does not count.
    studies = answer.fused.studies.set_index("study_id")[list(STUDY_CLASSES)]
    assert studies.loc[["s", "t"]].to_numpy() == pytest.approx(np.array([[0.8, 0.2, 0, 0], [0, 0, 1, 0]]))
    assert answer.fused.detections[["image_id", "finding", "score", *BOX]].to_numpy().tolist() == [
        ["a", "opacity", pytest.approx(0.9), *map(pytest.approx, (10, 10, 40, 50))]
    ]
    assert answer.fused.nones.set_index("image_id").seen.to_dict() == {"a": True, "b": False}
    assert (answer.classes, answer.masks, answer.runs) == (None, None, None) and answer.maps("a") == {}
    ask(*given)  # loads nothing again
    assert study.read == boxes.read == broken.read == [["a", "b"]] * 2
    assert ask.loads == [(name, BATCH_SIZE, None) for name in ("study-fold0", "boxes-fold1", "broken-fold2")]


def test_predictions_are_made_with_a_submissions_settings():
    settings = SubmitSettings()
    assert (settings.batch_size, settings.file_timeout_s) == (BATCH_SIZE, FILE_TIMEOUT_S)


def test_if_all_models_fail_the_last_error_is_raised(ask):
    broken = [Predictor(name, error=ValueError(name)) for name in ("first", "last")]
    with pytest.raises(ValueError, match="last"):
        ask(*((each, ("study", "none"), {}) for each in broken))


def test_models_share_the_cache_of_their_systems_lungs(ask):
    one = Predictor("study", *STUDIES)
    two = Predictor("two", *(table.assign(model="two") for table in STUDIES))
    masked = {"wants_masks": True}
    answer = ask((one, ("study", "none"), masked), (two, ("study", "none"), masked))
    lungs = ask.models.segmenter(ask.system)
    assert [each for *_, each in ask.loads] == [lungs, lungs]
    assert lungs.masked and lungs.batch_size == BATCH_SIZE and lungs.most
    (fault,) = answer.faults
    assert fault.startswith("The lung segmenter failed: FileNotFoundError: the weights contain no lung segmenter")
    assert ask((one, ("study", "none"), {})).faults == ()  # a model that uses no lungs
    # The cached lungs are in the pixels of decoded copies, which are larger in another system.
    ask((one, ("study", "none"), {**masked, "longest_side": 128}))
    assert ask.models.segmenter(ask.system) is not lungs


def test_a_lung_segmenter_finds_the_lungs_of_each_image(ask, monkeypatch):
    class Segmenter:
        def find(self, xrays):
            return [Lungs(None)] * len(xrays)

    monkeypatch.setattr(cached_lungs, "load_segmenter", lambda *_, **__: Segmenter())
    unet = Predictor("unet", fold=3)
    answer = ask((unet, ("lungs",), {}), lungs=Path("unet"), notes=("one of two",))
    assert answer.models[["model", "fold"]].to_numpy().tolist() == [["unet", 3]]
    assert answer.models.seconds.between(0, 60).all()
    assert (answer.remarks, answer.faults, answer.fused) == (("one of two",), (), None)
    assert ask.models.segmenter(ask.system).segmented == 2 and unet.read == []
    answer = ask((unet, ("lungs",), {}))  # without a bundle
    assert answer.faults == answer.remarks and answer.faults[0].startswith("The lung segmenter failed: FileNotFoundError")


def test_an_ensemble_that_cannot_be_used_is_a_fault_and_one_that_was_read_is_kept(ask, tmp_path):
    study = Predictor("study", *STUDIES), ("study", "none"), {}
    answer = ask(study, ensemble=tmp_path / "ensemble")
    assert answer.faults == answer.remarks and len(answer.fused.studies) == 2
    assert answer.faults[0].startswith("The ensemble failed: ") and answer.faults[0].endswith(" combined without it.")
    write_ensemble(tmp_path / "ensemble", Ensemble("both", "mean", ("study", "gone"), STUDY_CLASSES, "study_id"))
    for _ in range(2):
        (fault,) = ask(study, ensemble=tmp_path / "ensemble").faults
        assert fault == "The ensemble: 2 of 2 studies lack gone; they get the plain mean of the other learners."
        shutil.rmtree(tmp_path / "ensemble", ignore_errors=True)


def classifiers():
    """Return models for `ask`: two folds of a classifier, and another classifier.

    The first fold has predicted image a twice, as two models in one do. Image b has no other prediction.
    """
    predictors = [
        Predictor("first", class_scores("first", a=0.2, b=0.6), class_scores("first", a=0.4)),
        Predictor("first", class_scores("first", 1, a=0.5, b=np.nan), fold=1),
        Predictor("other", class_scores("other", a=0.8)),
    ]
    return [(each, ("classes",), {"classes": ("ill", "well")}) for each in predictors]


def test_classes_are_averaged_over_folds_then_over_models(ask):
    answer = ask(*classifiers())
    # a: the folds of the first model have 0.3 and 0.5, so the models have 0.4 and 0.8.
    assert answer.classes.set_index("image_id").ill.to_dict() == pytest.approx({"a": 0.6, "b": 0.6})
    assert answer.classes.set_index("image_id").well.to_dict() == pytest.approx({"a": 0.4, "b": 0.4})
    assert (answer.faults, answer.fused) == ((), None)


def test_an_ensemble_combines_classes_and_says_how_many_images_lack_a_learner(ask, tmp_path):
    weights = {"learners": np.array([0.25, 0.75])}
    ensemble = Ensemble("both", "weighted", ("first", "other"), ("ill", "well"), "image_id", weights=weights)
    write_ensemble(tmp_path / "weighted", ensemble)
    answer = ask(*classifiers(), ensemble=tmp_path / "weighted")
    assert answer.faults == ("1 images lack a learner; they get the plain mean of the other learners.",)
    # a: 0.25 x 0.4 + 0.75 x 0.8; b: the first learner alone.
    assert answer.classes.set_index("image_id").ill.to_dict() == pytest.approx({"a": 0.7, "b": 0.6})
    assert answer.classes.set_index("image_id").well.to_dict() == pytest.approx({"a": 0.3, "b": 0.4})
    # An ensemble of study models does not concern the classifiers beside them.
    write_ensemble(tmp_path / "studies", Ensemble("both", "mean", ("study",), STUDY_CLASSES, "study_id"))
    answer = ask((Predictor("study", *STUDIES), ("study", "none"), {}), *classifiers(), ensemble=tmp_path / "studies")
    assert answer.classes.set_index("image_id").loc["a", "ill"] == pytest.approx(0.6)
    assert answer.faults == () and not answer.fused.studies.prior.any()


def mask_maps(model, **greys):
    """Return a segmenter's map of each image, one row of pixels 0..255."""
    rows = [[name, model, 0, "pneumothorax", encode_grey(np.uint8([pixels]))] for name, pixels in greys.items()]
    return pd.DataFrame(rows, columns=["image_id", "model", "fold", "finding", "map"])


def test_masks_are_the_pixels_of_at_least_half_in_the_mean_map(ask):
    greys = {"one": [0, 255, 127, 254], "two": [0, 255, 127, 2]}
    classes = {"classes": ("pneumothorax",)}
    models = [(Predictor(name, mask_maps(name, a=pixels)), ("masks",), classes) for name, pixels in greys.items()]
    for competition in (None, VINBIGDATA):  # VinBigData has no masks, so none is tuned for it
        answer = ask(*models, competition=competition)
        assert answer.maps("a")["pneumothorax"].tolist() == [[0, 1, 127 / 255, 128 / 255]]
        assert answer.mask("a").tolist() == [[False, True, False, True]]
        assert answer.maps("b") == {} and answer.mask("b") is None and (answer.runs, answer.fused) == (None, None)


def test_a_mask_unites_all_structures_unless_a_tuned_fusion_has_decided():
    greys = {"x": [0, 200, 0], "y": [200, 0, 0], "z": [0, 0, 100]}
    masks = pd.DataFrame([["a", name, encode_grey(np.uint8([pixels]))] for name, pixels in greys.items()])
    answer = Answer(pd.DataFrame(), (), masks=masks.set_axis(["image_id", "finding", "map"], axis=1))
    assert list(answer.maps("a")) == ["x", "y", "z"] and answer.mask("a").tolist() == [[True, True, False]]
    decided = replace(answer, runs={"a": np.array([[0, 3]])})  # a run of 3 pixels
    assert decided.mask("a").sum() == 3 and decided.mask("b") is None

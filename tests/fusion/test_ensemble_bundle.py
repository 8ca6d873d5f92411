"""Ensemble bundles: reading returns what was written; damaged and invalid bundles are refused."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from kitlib.errors import BundleError
from kitlib.fusion import ensemble_bundle
from kitlib.fusion.ensemble_bundle import Ensemble, apply_ensemble, read_ensemble, write_ensemble
from kitlib.fusion.ensembles import combine
from kitlib.paths import project_root
from kitlib.scoring.temperature import scaled

CLASSES = ("sick", "well")


def flannel(**fields) -> Ensemble:
    rng = np.random.default_rng(0)
    weights = {"weight": rng.normal(size=(2, 16)).astype(np.float32), "bias": rng.normal(size=2).astype(np.float32)}
    stated = {"settings": {"gamma": 2.0}, "folds": (0, 1), "protocol": "nested", "temperature": 0.5, "weights": weights}
    stated |= {"name": "both", "method": "flannel", "learners": ("one", "two"), "classes": CLASSES, "key": "image_id"}
    return Ensemble(**stated | fields)


def scores(sick: dict[tuple[str, str, int], float]) -> pd.DataFrame:
    table = pd.DataFrame([(*place, p) for place, p in sick.items()], columns=["image_id", "model", "fold", "sick"])
    return table.assign(well=1 - table.sick)


@pytest.mark.parametrize(
    "ensemble",
    [
        flannel(),
        flannel(method="mean", weights={}, temperature=1.0),
        flannel(method="weighted", weights={"learners": np.array([0.25, 0.75])}),
    ],
)
def test_reading_returns_the_ensemble_that_was_written(ensemble, tmp_path):
    write_ensemble(tmp_path, ensemble)
    back = read_ensemble(tmp_path)
    assert replace(back, weights={}) == replace(ensemble, weights={})
    assert back.weights.keys() == ensemble.weights.keys()
    assert all(np.array_equal(back.weights[name], each) for name, each in ensemble.weights.items())


def test_apply_combines_the_means_over_folds_and_averages_rows_that_lack_a_learner():
    table = scores(
        {
            ("b", "two", 0): 0.1,
            ("b", "one", 0): 0.6,
            ("b", "one", 1): 0.8,  # mean .7
            ("a", "one", 0): 0.3,
            ("b", "stranger", 0): 1.0,
            ("c", "one", 0): 0.2,
            ("c", "two", 0): np.nan,
        }
    )
    ensemble = flannel()
    prediction = apply_ensemble(ensemble, table.sample(frac=1, random_state=0)).set_index("image_id")
    whole = scaled(combine("flannel", ensemble.weights, np.array([[[0.7, 0.3], [0.1, 0.9]]])), 0.5)
    assert prediction.answered.to_dict() == {"a": 1, "b": 2, "c": 1}
    np.testing.assert_allclose(prediction.loc["b", list(CLASSES)].to_numpy(float), whole[0], atol=1e-12)
    np.testing.assert_allclose(prediction.loc[["a", "c"], "sick"].to_numpy(), [0.3, 0.2])
    assert len(apply_ensemble(ensemble, table[:0])) == 0
    with pytest.raises(BundleError, match=r"the scores lack columns that the ensemble '\w+' needs: well"):
        apply_ensemble(ensemble, table.drop(columns="well"))


def damage(folder, fault):
    record = json.loads((folder / "ensemble.json").read_text())
    if fault == "missing":
        (folder / "weights.safetensors").unlink()
    elif fault == "other weights":
        (folder / "weights.safetensors").write_bytes(b"\x80\x04pickle")
    elif fault == "no json":
        (folder / "ensemble.json").write_text("{")
        return
    elif fault == "no object":
        (folder / "ensemble.json").write_text("[]")
        return
    elif fault == "unknown key":
        record["more"] = 1
    elif fault == "type":
        record["temperature"] = 1
    elif fault == "learners":
        record["learners"] = ["one", "two", "three"]
    elif fault == "method":
        record["method"] = "median"
    (folder / "ensemble.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"weights\.safetensors is missing; .*Give the `ensemble` folder of a run of notebook 65"),
        ("other weights", "has SHA-256 .*, but ensemble.json has .*; copy both files again"),
        ("no json", "is not valid JSON"),
        ("no object", "must have exactly the keys name, method, learners"),
        ("unknown key", "must have exactly the keys name, method, learners"),
        ("type", "temperature is 1, expected float"),
        ("learners", r"'flannel' with 3 learners and 2 classes needs weights .*\(3, 36\).* but the shapes are .*\(2, 16\)"),
        ("method", "method is 'median'; valid methods are: mean, vote, weighted, flannel"),
    ],
)
def test_damaged_bundles_are_refused(fault, message, tmp_path):
    write_ensemble(tmp_path, flannel())
    damage(tmp_path, fault)
    with pytest.raises(BundleError, match=message):
        read_ensemble(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key": "patient_id"}, "key is 'patient_id'; valid keys are: image_id, study_id"),
        ({"learners": ("one", "one")}, "without duplicates"),
        ({"learners": ()}, "expected at least one learner and two classes"),
        ({"classes": ("sick", "sick")}, "expected at least one learner and two classes"),
        ({"classes": ("sick",)}, "expected at least one learner and two classes"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a finite number above 0"),
        ({"temperature": np.inf}, "temperature is inf, expected a finite number above 0"),
        ({"weights": {"weight": np.full((2, 16), np.nan), "bias": np.zeros(2)}}, "a weight is not finite"),
    ],
)
def test_invalid_ensembles_are_not_written(fields, message, tmp_path):
    with pytest.raises(BundleError, match=message):
        write_ensemble(tmp_path, flannel(**fields))
    assert not list(tmp_path.iterdir())


def test_a_bundle_whose_writing_was_interrupted_is_refused(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    write_ensemble(tmp_path / "bundle", flannel())
    monkeypatch.setattr(ensemble_bundle, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_ensemble(tmp_path / "bundle", flannel(temperature=2.0))
    with pytest.raises(BundleError, match=r"ensemble\.json is missing; the folder contains: \['weights.safetensors'\]"):
        read_ensemble(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"ensemble\.json is missing; .*nowhere does not exist"):
        read_ensemble(tmp_path / "nowhere")


def test_reading_and_applying_needs_no_torch():
    script = (
        "import sys; sys.modules['torch'] = sys.modules['pytorch_lightning'] = None\n"
        "import numpy as np, pandas as pd, tempfile\n"
        "from kitlib.fusion.ensemble_bundle import *\n"
        "weights = {'weight': np.ones((1, 4)), 'bias': np.ones(1)}\n"
        "one = Ensemble('e', 'flannel', ('m',), ('a', 'b'), 'study_id', weights=weights)\n"
        "folder = tempfile.mkdtemp(); write_ensemble(folder, one)\n"
        "scores = pd.DataFrame({'study_id': ['s'], 'model': 'm', 'a': 0.5, 'b': 0.5})\n"
        "print(apply_ensemble(read_ensemble(folder), scores).a[0])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=project_root(), check=True)
    assert float(done.stdout) == pytest.approx(0.5)

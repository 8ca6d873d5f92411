"""The training of FLANNEL's weights: what it learns, when it stops, and that the order of learners changes nothing."""

import numpy as np
import pytest

from kitlib.fusion.train_flannel import ENSEMBLES, EnsembleSettings, ensemble_settings, train_flannel
from kitlib.settings import RecipeError

QUICK = ensemble_settings("flannel", epochs=6, batch_size=50)


@pytest.fixture(scope="module")
def lesson() -> tuple[np.ndarray, np.ndarray]:
    """300 rows of three learners, three classes: the second leans to the truth, the others know nothing."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    found = rng.dirichlet(np.ones(3), (300, 3))
    found[:, 1] = 0.5 * found[:, 1] + 0.5 * np.eye(3)[truth]
    return found, truth


def test_the_learner_that_knows_gets_the_largest_weight(lesson):
    learned, losses = train_flannel(*lesson, ensemble_settings("flannel", epochs=30, batch_size=50))
    assert learned["weight"].shape == (3, 81) and learned["bias"].shape == (3,)
    features = lesson[0].reshape(300, 9)
    pairs = (features[:, :, None] * features[:, None, :]).reshape(300, 81)
    weights = np.tanh(pairs @ learned["weight"].T + learned["bias"]).mean(axis=0)
    assert weights.argmax() == 1 and weights[1] > 0.6 > 0.5 > max(weights[0], weights[2]) and losses == []


def test_learners_in_another_order_get_the_same_weights_in_that_order(lesson):
    found, truth = lesson
    order = [2, 0, 1]
    one, _ = train_flannel(found, truth, QUICK)
    other, _ = train_flannel(found[:, order], truth, QUICK)
    pairs = np.arange(81).reshape(3, 3, 3, 3)[order][:, :, order].ravel()
    np.testing.assert_allclose(other["weight"], one["weight"][order][:, pairs], atol=1e-5)
    np.testing.assert_allclose(other["bias"], one["bias"][order], atol=1e-5)


def test_the_same_seed_gives_the_same_weights_and_a_random_start_another(lesson):
    one, again = train_flannel(*lesson, QUICK)[0], train_flannel(*lesson, QUICK)[0]
    assert np.array_equal(one["weight"], again["weight"])
    drawn = ensemble_settings("flannel", epochs=6, batch_size=50, start="random")
    assert abs(train_flannel(*lesson, drawn)[0]["weight"] - one["weight"]).max() > 1e-3


def test_it_stops_where_the_held_out_loss_has_stopped_falling_and_keeps_the_best_epoch(lesson):
    found, truth = lesson
    held = np.arange(300) % 3 == 0
    # what is held out contradicts the rest: every step makes it worse
    contrary = np.where(held, (truth + 1) % 3, truth)
    settings = ensemble_settings("flannel", epochs=50, batch_size=50, patience=2)
    learned, losses = train_flannel(found, contrary, settings, held)
    assert len(losses) == 4 and losses == sorted(losses)
    first, _ = train_flannel(found[~held], contrary[~held], ensemble_settings("flannel", epochs=1, batch_size=50))
    np.testing.assert_array_equal(learned["weight"], first["weight"])
    # without patience nothing is held out
    whole = ensemble_settings("flannel", epochs=2, batch_size=50, patience=0)
    one, none = train_flannel(found, contrary, whole, held), train_flannel(found, contrary, whole)
    assert one[1] == [] and np.array_equal(one[0]["weight"], none[0]["weight"])


def test_a_class_that_does_not_occur_is_no_obstacle(lesson):
    found, truth = lesson
    kept = truth != 2
    learned, losses = train_flannel(found[kept], truth[kept], QUICK, np.arange(kept.sum()) < 20)
    assert np.isfinite(learned["weight"]).all() and np.isfinite(losses).all()
    with pytest.raises(ValueError, match="no rows to train on: of 300, 300 are held out"):
        train_flannel(found, truth, QUICK, np.ones(300, bool))


def test_settings_are_strict_and_the_published_ones_are_the_codes():
    published = ENSEMBLES["flannel_published"]
    assert (published.gamma, published.alpha, published.reduction, published.learning_rate) == (10, "published", "sum", 1e-5)
    assert (published.batch_size, published.epochs, published.stack_on) == (20, 200, "in_sample")
    assert EnsembleSettings().stack_on == "out_of_fold"
    for wrong, message in (
        ({"method": "median"}, "method is 'median'; wanted one of 'mean', 'vote'"),
        ({"gama": 1.0}, "has no field 'gama'"),
        ({"gamma": -1.0}, "gamma is -1.0; wanted a finite number of at least 0"),
        ({"epochs": 0}, "epochs is 0; wanted a whole number of at least 1"),
        ({"stack_on": "test"}, "stack_on is 'test'; wanted one of 'out_of_fold', 'in_sample'"),
    ):
        with pytest.raises(RecipeError, match=message):
            ensemble_settings("flannel", **wrong)
    with pytest.raises(RecipeError, match="no ensemble is called 'flanel'; there are: mean"):
        ensemble_settings("flanel")

"""Model families: each recipe has one, and an unknown one is refused."""

import pytest

from kitlib.errors import BundleError
from kitlib.models.families import FAMILIES, family_of, recorded_family
from kitlib.recipes.fields import DetectorRecipe, TrainingRecipe


@pytest.mark.parametrize("name", FAMILIES)
def test_each_familys_recipe_and_record_belong_to_it(name):
    kind = FAMILIES[name].recipe
    recipe = kind(family=name) if kind is DetectorRecipe else kind()
    assert family_of(recipe) is recorded_family({"family": name}) is FAMILIES[name]


def test_what_belongs_to_no_family_is_refused():
    class Other(TrainingRecipe):
        pass

    with pytest.raises(ValueError, match="Other belongs to no model family"):
        family_of(Other())
    with pytest.raises(BundleError, match="somewhere: unknown family 'future'"):
        recorded_family({"family": "future"}, "somewhere")

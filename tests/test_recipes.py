import pytest

from kitlib.recipes import DetectorRecipe, RecipeError, StudyRecipe, from_dict, override, recipe


def test_overrides_replace_fields_and_leave_the_published_recipe_alone():
    shorter = recipe("heidelberg_study", StudyRecipe, epochs=2, dropout=0)
    assert (shorter.epochs, shorter.dropout, shorter.backbone) == (2, 0.0, "resnext101_32x8d")
    assert recipe("heidelberg_study", StudyRecipe).epochs == 58


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipe("heidelberg", StudyRecipe), "no recipe is called 'heidelberg'; there are: heidelberg_backbone"),
        (lambda: recipe("heidelberg_yolo", StudyRecipe), "is a DetectorRecipe, wanted a StudyRecipe: heidelberg_study"),
        (lambda: override(StudyRecipe(), epoch=3), "no field 'epoch'; it has: backbone"),
        (lambda: override(StudyRecipe(), epochs="3"), "epochs wants int, got '3'"),
        (lambda: override(StudyRecipe(), epochs=True), "epochs wants int, got True"),
        (lambda: override(StudyRecipe(), epochs=3.0), "epochs wants int, got 3.0"),
        (lambda: from_dict(DetectorRecipe, ["a"]), "wants a mapping"),
    ],
)
def test_unknown_names_and_types_are_errors_that_list_what_is_valid(call, message):
    with pytest.raises(RecipeError, match=message):
        call()

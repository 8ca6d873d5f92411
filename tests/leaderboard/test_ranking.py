from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from kitlib.atomic import write_json
from kitlib.bundle import data_fingerprint
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import LeaderboardError
from kitlib.leaderboard.entries import read_entries
from kitlib.leaderboard.listing import list_runs
from kitlib.leaderboard.ranking import compare, rank
from kitlib.notebook import run_notebook
from kitlib.paths import project_root
from kitlib.recipes.named import RECIPES
from kitlib.reports.competition import detection_draws, interval
from kitlib.reports.figures import rankings_figure
from kitlib.runs.kaggle_scores import add_score
from kitlib.settings import override
from kitlib.tables import write_table
from tests.small_runs import (
    NOTHING,
    coverage,
    false_boxes,
    image_scores,
    prepare,
    study_scores,
    tables_of,
    train,
    true_boxes,
)
from tests.small_xrays import RECIPE, SmallXrays

# 32 images of 16 studies, a quarter of each class; 24 images have one box, 12 in each fold.
TABLES = tables_of(SmallXrays())
OTHER_FOLDS = {**TABLES, "folds": TABLES["folds"].assign(fold=1 - TABLES["folds"].fold)}


def board(folder, samples=20, folds=()):
    return rank(read_entries(list_runs([folder]), folds), samples)


def both_right(**changes):
    """Return predictions with perfect study classes (AP 1 each) and equal `none` for 32 images, 8 positive (AP 8/32)."""
    return {"study_scores": study_scores(TABLES, 1.0), "image_scores": image_scores(TABLES), **changes}


def test_figures_are_those_of_the_tables(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    train(tmp_path / "right", TABLES, **both_right())
    train(tmp_path / "blind", TABLES, **both_right(study_scores=study_scores(TABLES, 0.25)))
    train(tmp_path / "studies", TABLES, study_scores=study_scores(TABLES, 1.0))
    is_none = ~TABLES["folds"].id.isin(TABLES["boxes"].image_id)
    train(tmp_path / "nones", TABLES, image_scores=image_scores(TABLES, none=is_none * 0.5 + 0.1))
    half = true_boxes(TABLES, 0.9)[lambda boxes: boxes.fold == 0]
    train(tmp_path / "boxes", TABLES, detections=half, coverage=coverage(TABLES))
    leaderboard = board(tmp_path)
    rows = leaderboard.table.set_index("name")
    # Blind: equal scores for 16 studies, 4 of ranking class: AP 4/16. The score is the mean over the predicted classes.
    assert rows.score.dropna().to_dict() == pytest.approx(
        {"right": (4 + 0.25) / 5, "blind": 0.25, "studies": 1.0, "nones": 1.0, "boxes": 0.5}
    )
    assert rows.loc["right", ["studies", "none"]].tolist() == pytest.approx([1.0, 0.25])
    assert rows.loc["boxes", "opacity"] == pytest.approx(0.5) and rows.images.dropna().unique().tolist() == [32]
    assert (rows.low <= rows.score)[rows.score.notna()].all() and (rows.high >= rows.score)[rows.score.notna()].all()
    # Models with different kinds of prediction are not ranked together.
    ranked = {number: ranking.name.tolist() for number, ranking in leaderboard.rankings().items()}
    assert sorted(ranked.values()) == [["boxes"], ["nones"], ["right", "blind"], ["studies"]]
    assert rows.loc["prepare", ["kind", "state"]].tolist() == ["prepared", "finished"] and pd.isna(rows.score["prepare"])
    assert leaderboard.summary().startswith("5 models in 4 rankings, 1 other runs without a score.")
    assert "different sets of folds" not in leaderboard.summary() and "ranked separately" not in leaderboard.summary()


def test_folds_in_several_runs_are_one_model_whose_boxes_are_pooled(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    common = {"model": "yolo", "coverage": coverage(TABLES)}
    train(tmp_path / "yolo-0", TABLES, folds=[0], detections=true_boxes(TABLES, 0.5), **common)
    train(tmp_path / "yolo-1", TABLES, folds=[1], detections=false_boxes(TABLES, 0.9), **common)
    # A run with another recipe, or an unfinished one, is a model by itself.
    train(tmp_path / "yolo-2", TABLES, folds=[1], detections=NOTHING, recipe=override(RECIPE, epochs=9), **common)
    train(tmp_path / "yolo-3", TABLES, folds=[1], finished=False, **common)
    for name, fold in (("net", 0), ("net-1", 1)):
        train(tmp_path / name, TABLES, folds=[fold], model="net", study_scores=study_scores(TABLES, 1.0, "net"))
    rows = board(tmp_path).table.set_index("name")
    assert set(rows.index) == {"prepare", "yolo-[0,1]", "yolo-2", "yolo-3", "net + net-1"}
    # 16 false positive boxes rank above 12 of the 24 true positives: recall 0.5 at precision 12/28. The mean over folds
    # would be 0.5.
    assert rows.score["yolo-[0,1]"] == pytest.approx(0.5 * 12 / 28)
    assert rows.folds["yolo-[0,1]"] == "0, 1" and rows.images["yolo-[0,1]"] == 32
    assert rows.score["yolo-2"] == 0.0 and rows.images["yolo-2"] == 16
    assert rows.state["yolo-3"] == "unfinished" and pd.isna(rows.score["yolo-3"])


def test_the_same_fold_twice_is_two_models(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    for name in ("first", "again"):
        train(tmp_path / name, TABLES, **both_right())
    assert board(tmp_path).rankings()[1].name.tolist() == ["again", "first"]


def test_runs_of_different_folds_are_neither_ranked_together_nor_compared_unasked(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    prepare(tmp_path / "prepare_again", OTHER_FOLDS)
    train(tmp_path / "one", TABLES, **both_right())
    train(tmp_path / "two", TABLES, **both_right(image_scores=image_scores(TABLES, 0.1)))
    train(
        tmp_path / "other", OTHER_FOLDS, study_scores=study_scores(OTHER_FOLDS, 0.25), image_scores=image_scores(OTHER_FOLDS)
    )
    entries = read_entries(list_runs([tmp_path]))
    leaderboard = rank(entries, 20)
    assert sorted(rows.name.tolist() for rows in leaderboard.rankings().values()) == [["one", "two"], ["other"]]
    assert leaderboard.differences.name.tolist() == ["two"]
    groups = ", ".join(leaderboard.table.dropna(subset="ranking").folds_fingerprint.unique())
    assert f"The models use 2 different sets of folds ({groups}): scores of models with" in leaderboard.summary()
    with pytest.raises(
        LeaderboardError, match=r"'one' has folds \w{8}, but 'other' has folds \w{8}\. .*not comparable.*across_folds = True"
    ):
        compare(entries, "one", "other")
    across = compare(entries, "one", "other", across_folds=True, samples=20).set_index("figure")
    # 0.25 - 1 for each of the four classes, 0 for none.
    assert across.difference.to_dict() == pytest.approx(
        {"score": -0.6, **dict.fromkeys(STUDY_CLASSES, -0.75), "none": 0.0, "studies": -0.75}
    )
    assert (across.images == 32).all()


def test_models_that_are_scored_against_other_boxes_are_not_ranked_together(tmp_path):
    fewer = {**TABLES, "boxes": TABLES["boxes"].iloc[1:]}
    prepare(tmp_path / "prepare", TABLES)
    prepare(tmp_path / "prepare_again", fewer)
    train(tmp_path / "one", TABLES, **both_right())
    train(tmp_path / "other", fewer, parameters={"prepare_run": "prepare_again"}, **both_right())
    leaderboard = board(tmp_path)
    assert sorted(rows.name.tolist() for rows in leaderboard.rankings().values()) == [["one"], ["other"]]
    assert "or against different labels or boxes, are ranked separately" in leaderboard.summary()


def test_models_of_some_folds_are_ranked_on_these_folds_if_requested(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    train(tmp_path / "all", TABLES, **both_right())
    train(tmp_path / "first", TABLES, folds=[0], recipe=override(RECIPE, epochs=9), **both_right())
    apart = board(tmp_path)
    assert len(apart.rankings()) == 2 and "set `folds` to folds that all of them have" in apart.summary()
    together = board(tmp_path, folds=[0])
    assert [rows.name.tolist() for rows in together.rankings().values()] == [["all", "first"]]
    assert together.table.images.dropna().tolist() == [16, 16] and "set `folds`" not in together.summary()
    missing = board(tmp_path, folds=[1]).table.set_index("name")
    assert missing.remark["first"] == "no score: no predictions for folds [1] (its own metrics.json says 0.1250)"


def test_differences_are_paired_over_patients(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    all_of_them, covered = true_boxes(TABLES, 0.6), coverage(TABLES)
    missed = pd.concat([all_of_them.iloc[::3], false_boxes(TABLES, 0.4).iloc[::2]])
    detections_of = {"best": all_of_them, "same": all_of_them, "worse": missed}
    for name, detections in detections_of.items():
        train(tmp_path / name, TABLES, detections=detections, coverage=covered)
    differences = board(tmp_path, samples=50).differences.set_index("name")
    assert differences.loc["same", ["difference", "low", "high"]].tolist() == [0, 0, 0]
    # The report's bootstrap draws give the same comparison of two detectors.
    draws = {
        name: detection_draws(boxes, covered, TABLES["images"], TABLES["boxes"], 50) for name, boxes in detections_of.items()
    }
    expected = interval(draws["worse"] - draws["best"])
    assert differences.loc["worse", ["difference", "low", "high"]].tolist() == pytest.approx(list(expected.values()))
    assert expected["low"] < expected["value"] < expected["high"] < 0


def test_a_run_that_cannot_be_scored_has_a_remark_that_says_why(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    in_sample = study_scores(TABLES, 1.0).assign(fold=lambda table: 1 - table.fold)
    train(tmp_path / "in_sample", TABLES, study_scores=in_sample)
    moved = {**TABLES, "labels": TABLES["labels"].iloc[:-1]}
    train(tmp_path / "elsewhere", moved, study_scores=study_scores(TABLES, 1.0), recipe=override(RECIPE, epochs=8))
    damaged = train(tmp_path / "damaged", TABLES, coverage=coverage(TABLES), detections=NOTHING)
    (damaged / "tables" / "detections.parquet").write_bytes(b"PAR1")
    write_json(tmp_path / "broken_prepare" / "metrics.json", {"longest_side": 1})
    (tmp_path / "broken_prepare" / "tables").mkdir()
    (tmp_path / "broken_prepare" / "tables" / "folds.parquet").write_text("")
    leaderboard = board(tmp_path)
    remarks = leaderboard.table.set_index("name").remark
    assert leaderboard.rankings() == {} and (leaderboard.table.state == "finished").all()
    assert "16 predictions are not out of fold; the first is for 'study000' by model" in remarks["in_sample"]
    assert "the prepared run with the training data" in remarks["elsewhere"] and "was not found" in remarks["elsewhere"]
    assert remarks["damaged"].startswith("no score: ") and "metrics.json says 0.1250" in remarks["damaged"]
    assert "its folds cannot be read" in remarks["broken_prepare"]
    entries = read_entries(list_runs([tmp_path]))
    with pytest.raises(
        LeaderboardError, match=r"in_sample has no out-of-fold score \(state finished\). no score: 16 predictions"
    ):
        compare(entries, "in_sample", "elsewhere")
    with pytest.raises(LeaderboardError, match="unknown run 'study'; runs with a score: none"):
        compare(entries, "study", "elsewhere")
    with pytest.raises(LeaderboardError, match="`samples` is 0"):
        rank(entries, 0)


def test_a_prepared_run_that_is_not_listed_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    prepare(tmp_path / "inputs" / "prepare", TABLES)
    train(tmp_path / "runs" / "study", TABLES, **both_right())
    assert board(tmp_path / "runs").table.score.tolist() == pytest.approx([0.85])


def test_a_fusion_is_judged_by_the_competitions_score(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    train(tmp_path / "study", TABLES, **both_right())
    train(tmp_path / "yolo", TABLES, model="yolo", detections=true_boxes(TABLES, 0.9), coverage=coverage(TABLES))
    fuse = tmp_path / "fuse"
    fused = {
        "studies": study_scores(TABLES, 1.0).drop(columns=["model", "fold"]).assign(prior=False),
        "nones": image_scores(TABLES).drop(columns=["model", "fold"]).assign(prior=False, seen=True),
        "detections": true_boxes(TABLES, 0.9).drop(columns=["model", "fold"]),
    }
    (fuse / "tables").mkdir(parents=True)
    for name, table in fused.items():
        table.to_parquet(fuse / "tables" / f"{name}.parquet")
    write_json(fuse / "fusion.json", {})
    write_json(fuse / "metrics.json", {"runs": ["study", "yolo"], "score": 0.9, "cross_fitted_score": 0.8})
    write_json(fuse / "record.json", {"started": "2026-11-02T00:00:00+00:00"})
    # The second submission is the last one, and the third was of an earlier run in the same folder.
    for version, pushed, public in ((2, "2026-11-03", 0.5), (3, "2026-11-04", 0.61), (1, "2026-11-01", 0.4)):
        submission = {"kernel": "somebody/fused", "version": version, "pushed": pushed}
        add_score(fuse, {**submission, "public_score": public, "private_score": public - 0.01})
    leaderboard = board(tmp_path)
    row = leaderboard.table.set_index("name").loc["fuse"]
    # (4 * 1 + 0.25 + 1) / 6
    assert row.score == pytest.approx(0.875) and row.low <= 0.875 <= row.high
    assert [row.figure, row.images, row.cross_fitted] == ["competition score", 32, 0.8]
    assert [row.kaggle_public, row.kaggle_private] == [0.61, 0.6]
    assert len(set(leaderboard.table.folds_fingerprint)) == 1
    unlisted = [run for run in list_runs([tmp_path]) if run.folder.name not in ("study", "yolo")]
    assert rank(read_entries(unlisted)).table.set_index("name").score["fuse"] == pytest.approx(0.875)
    # The fusion's metrics contain the paths that its runs had before the folder was moved.
    write_json(fuse / "metrics.json", {"runs": ["/kaggle/working/study", "/kaggle/working/yolo"], "score": 0.9})
    assert board(tmp_path).table.set_index("name").score["fuse"] == pytest.approx(0.875)
    # Only predictions that both models make are compared, and the fusion uses those of the study run unchanged.
    compared = compare(read_entries(list_runs([tmp_path])), "fuse", "study", samples=5)
    assert compared.set_index("figure").difference[["score", "negative", "none"]].tolist() == [0, 0, 0]
    assert "opacity" not in set(compared.figure)
    write_json(fuse / "metrics.json", {"runs": ["gone"], "score": 0.9})
    assert "the fused runs were not found: gone; add" in board(tmp_path).table.set_index("name").remark["fuse"]
    write_json(fuse / "metrics.json", {"runs": ["gone", "study"], "score": 0.9})
    assert board(tmp_path).table.set_index("name").score["fuse"] == pytest.approx(0.875)


def test_findings_are_judged_by_their_mean_roc_auc(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    studies = (
        TABLES["images"]
        .merge(TABLES["labels"], left_on="study_id", right_on="id")
        .merge(TABLES["folds"].rename(columns={"id": "image_id"}), on="image_id")
    )
    right = studies[["image_id", "fold", *STUDY_CLASSES]].assign(model="nih")
    blind = right.assign(typical=0.5, atypical=0.5)
    for name, scores in {"right": right, "half_blind": blind}.items():
        train(tmp_path / name, TABLES, model="nih", recipe=RECIPES["small_backbone"], class_scores=scores)
    # Recipes of an older kitlib lack the field: all its classifiers had independent classes.
    older = {name: value for name, value in asdict(RECIPES["small_backbone"]).items() if name != "multi_label"}
    train(tmp_path / "older", TABLES, model="nih", of_fold={"recipe": older}, class_scores=blind)
    leaderboard = board(tmp_path)
    # Two classes are ranked perfectly, two have a constant score: (1 + 1 + 0.5 + 0.5) / 4.
    expected = {"right": 1.0, "half_blind": 0.75, "older": 0.75}
    assert leaderboard.rankings()[1].set_index("name").auc.to_dict() == pytest.approx(expected)
    assert leaderboard.rankings()[1].figure.unique().tolist() == ["mean ROC AUC"]
    assert leaderboard.differences.difference.tolist() == pytest.approx([-0.25, -0.25])


def test_the_figure_has_one_panel_per_ranking():
    rows = [("a", 1, 0.5), ("b", 1, 0.25), ("c", 2, 0.0)]
    table = pd.DataFrame(rows, columns=["name", "ranking", "score"]).assign(
        low=lambda t: t.score,
        high=lambda t: t.score + 0.1,
        figure="AP",
        images=9,
        recipe="small",
        changes="",
        folds_fingerprint="1",
    )
    figure = rankings_figure(table)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["AP, 9 images, folds 1"] * 2
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b"]
    assert first.lines[0].get_xydata().tolist() == [[0.5, 0], [0.25, 1]]
    assert first.collections[0].get_segments()[1].tolist() == pytest.approx(np.array([[0.25, 1], [0.35, 1]]))
    assert [text.get_text() for text in first.texts] == ["0.500  small", "0.250  small"]
    # The best is on top, and the axis does not extend below 0, where no score can be.
    assert first.transData.transform((0.5, 0))[1] > first.transData.transform((0.5, 1))[1]
    assert figure.axes[1].get_xlim()[0] == 0
    assert rankings_figure(table.head(0)).axes


def test_the_notebook_lists_and_compares(tmp_path, quick_processes):
    runs = tmp_path / "runs"
    prepare(runs / "prepare", TABLES)
    train(runs / "right", TABLES, **both_right())
    train(runs / "blind", TABLES, **both_right(study_scores=study_scores(TABLES, 0.25)))
    train(runs / "stopped", TABLES, folds=[0], finished=False)
    parameters = {"runs": [str(runs)], "run_folder": str(runs / "leaderboard"), "compare": ["right", "blind"], "samples": 20}
    notebook, out = project_root() / "notebooks" / "90_leaderboard.ipynb", runs / "leaderboard"
    run_notebook(notebook, tmp_path / "90.ipynb", parameters, out / "metrics.json")
    table = pd.read_csv(out / "leaderboard.csv").set_index("name")
    assert table.score.dropna().to_dict() == pytest.approx({"right": 0.85, "blind": 0.25})
    assert table.state["stopped"] == "unfinished" and "leaderboard" not in table.index
    assert pd.read_csv(out / "differences.csv").difference.tolist() == pytest.approx([-0.6])
    assert pd.read_csv(out / "compared.csv").set_index("figure").difference["studies"] == pytest.approx(-0.75)
    assert (out / "figures" / "rankings.png").is_file()


def test_segmenters_are_ranked_by_the_dice_of_the_lungs_with_paired_differences(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    rows = [(each.id, "m", each.fold, name) for each in TABLES["folds"].itertuples() for name in ("lungs", "heart")]
    masks = pd.DataFrame(rows, columns=["image_id", "model", "fold", "structure"])
    for name, dice in (("good", 0.9), ("poor", 0.8)):
        # A Dice of d is a Jaccard of d / (2 - d); the heart does not count.
        mask_scores = masks.assign(dice=dice, jaccard=dice / (2 - dice)).assign(
            dice=lambda t, d=dice: d * (t.structure == "lungs")
        )
        train(tmp_path / name, TABLES, model=name, mask_scores=mask_scores)
    leaderboard = board(tmp_path)
    table = leaderboard.table.set_index("name")
    assert table.score.dropna().to_dict() == pytest.approx({"good": 0.9, "poor": 0.8})
    assert table.loc["good", ["kind", "figure", "images"]].tolist() == ["lungs", "mean Dice of the lungs", 32]
    assert leaderboard.differences.loc[0, ["difference", "low", "high"]].tolist() == pytest.approx([-0.1, -0.1, -0.1])


# Four exclusive classes, one image per study, three folds.
EXCLUSIVE = {
    "images": TABLES["images"].assign(study_id=TABLES["images"].image_id),
    "labels": pd.DataFrame(np.eye(4)[np.arange(32) // 2 % 4], columns=list("abcd")).assign(id=TABLES["images"].image_id),
    "boxes": TABLES["boxes"],
    "folds": TABLES["folds"].assign(fold=np.arange(32) // 4 % 3),
}
CLASSIFIER = override(RECIPES["small_backbone"], multi_label=False)


def class_scores(model, wrong=0):
    """Return certain and correct scores, except that the first `wrong` images get the next class."""
    truth = EXCLUSIVE["labels"][list("abcd")].to_numpy().argmax(axis=1)
    truth[:wrong] = (truth[:wrong] + 1) % 4
    folds = EXCLUSIVE["folds"]
    scores = pd.DataFrame(np.eye(4)[truth], columns=list("abcd"))
    return scores.assign(image_id=folds.id, fold=folds.fold, model=model)


def nested_run(folder, model, outer, wrong=0):
    """Write a run with one outer fold held out: models in outer<k>/fold<n>, and scores of that fold's images."""
    remaining = {**EXCLUSIVE, "folds": EXCLUSIVE["folds"][EXCLUSIVE["folds"].fold != outer].reset_index(drop=True)}
    inner = [fold for fold in range(3) if fold != outer]
    train(folder / f"outer{outer}", remaining, folds=inner, model=model, recipe=CLASSIFIER, finished=False)
    (folder / f"outer{outer}" / "record.json").rename(folder / "record.json")
    scores = class_scores(model, wrong)
    write_table(scores[scores.fold == outer], "class_scores", folder / "tables" / "class_scores.parquet")
    parameters = {"prepare_run": "prepare", "recipe": "small_backbone", "folds": [0, 1, 2], "outer_folds": [outer]}
    write_json(folder / "record.json", {"parameters": parameters})
    write_json(folder / "metrics.json", {"model": model, "folds_fingerprint": data_fingerprint(folds=EXCLUSIVE["folds"])})


def test_exclusive_classes_of_nested_folds_and_ensembles_are_ranked_by_macro_f1(tmp_path):
    prepare(tmp_path / "prepare", EXCLUSIVE)
    train(tmp_path / "plain", EXCLUSIVE, (0, 1, 2), "plain", CLASSIFIER, class_scores=class_scores("plain", 4))
    for outer in range(3):
        nested_run(tmp_path / f"learner-{outer}", "learner", outer, wrong=2)
    scores = pd.concat([class_scores("learner", 2), class_scores("mean", 1), class_scores("flannel")])
    write_table(scores, "class_scores", tmp_path / "ensemble" / "tables" / "class_scores.parquet")
    write_json(tmp_path / "ensemble" / "ensemble" / "ensemble.json", {"method": "flannel"})
    write_json(tmp_path / "ensemble" / "record.json", {"parameters": {"prepare_run": "prepare"}})
    metrics = {"model": "flannel", "learners": ["learner"], "folds_fingerprint": data_fingerprint(folds=EXCLUSIVE["folds"])}
    write_json(tmp_path / "ensemble" / "metrics.json", metrics)
    leaderboard = board(tmp_path)
    assert len(leaderboard.rankings()) == 1
    rows = leaderboard.rankings()[1].set_index("name")
    assert rows.index.tolist() == ["ensemble: flannel", "ensemble: mean", "learner-[0,1,2]", "plain"]
    assert rows.figure.unique().tolist() == ["macro F1"] and rows.images.tolist() == [32] * 4
    assert rows.accuracy.to_dict() == {
        **{"ensemble: flannel": 1.0, "ensemble: mean": 31 / 32, "learner-[0,1,2]": 30 / 32, "plain": 28 / 32}
    }
    # By hand: there are 8 images of each class, and one of class a is called b; F1 14/15 and 16/17.
    assert rows.score["ensemble: mean"] == pytest.approx((14 / 15 + 16 / 17 + 2) / 4)
    assert rows.folds["learner-[0,1,2]"] == "0/1, 0/2, 1/0, 1/2, 2/0, 2/1" and rows.model["ensemble: mean"] == "mean"
    compared = compare(read_entries(list_runs([tmp_path])), "learner-[0,1,2]", "ensemble: flannel", samples=5)
    assert compared.set_index("figure").difference["accuracy"] == pytest.approx(2 / 32)


def test_exclusive_classifiers_compare_on_the_images_that_both_have_predicted(tmp_path):
    prepare(tmp_path / "prepare", EXCLUSIVE)
    train(tmp_path / "early", EXCLUSIVE, (0, 1), "early", CLASSIFIER, class_scores=class_scores("early", 4))
    train(tmp_path / "late", EXCLUSIVE, (1, 2), "late", CLASSIFIER, class_scores=class_scores("late", 6))
    compared = compare(read_entries(list_runs([tmp_path])), "early", "late", samples=5).set_index("figure")
    # Fold 1 has images 4 to 7, 16 to 19 and 28 to 31. The second model is wrong on two of these 12, images 4 and 5.
    assert compared.images.unique().tolist() == [12]
    assert compared["first"]["accuracy"] == 1 and compared.difference["accuracy"] == pytest.approx(-2 / 12)
    assert board(tmp_path).table.columns.is_unique


def test_nested_models_of_other_data_have_no_score(tmp_path):
    prepare(tmp_path / "prepare", {**EXCLUSIVE, "labels": EXCLUSIVE["labels"].assign(a=0.0, b=1.0, c=0.0, d=0.0)})
    nested_run(tmp_path / "learner", "learner", 0)

    def remark():
        (entry,) = (entry for entry in read_entries(list_runs([tmp_path])) if entry.name == "learner")
        assert entry.predictions is None
        return entry.remark

    assert "fold 0/1 of learner has training data other than" in remark()
    write_json(tmp_path / "learner" / "metrics.json", {"model": "learner", "folds_fingerprint": "of other folds"})
    assert "learner was trained with other folds than those in" in remark()
    write_json(tmp_path / "learner" / "record.json", {"parameters": {"prepare_run": "gone"}})
    assert "the parameter prepare_run is 'gone', but this prepared run does not exist" in remark()

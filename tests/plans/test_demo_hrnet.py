"""The demo of UNet + HRNet at its smallest: every step on phantoms, with two folds and one epoch."""

import pandas as pd
import pytest

from kitlib.paths import project_root
from kitlib.plans.plan import read_plan
from kitlib.runs.finished_run import read_prepared
from tests.small_plans import carry_out

PLAN = project_root() / "submissions" / "plans" / "demo_hrnet.yaml"
SMALLEST = {"images": 24, "mask_images": 12, "side": 64, "lungs_epochs": 2, "epochs": 1, "folds": [0, 1]}


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory, quick_processes):
    folder = tmp_path_factory.mktemp("hrnet")
    smallest = {**SMALLEST, "inputs": str(folder / "inputs"), "most_of": {"nih": 8, "chexpert": 7}}
    planned = read_plan(PLAN, folder / "runs", smallest).planned
    one_decoder = {"workers": 1}
    smaller = {"prepare": one_decoder, "prepare_lungs": one_decoder, "probe": {"folds": [0]}}
    smaller["report"] = {"samples": 5, "shown": 2, "heat_images": 2}
    for run in planned.values():
        carry_out(run, **smaller.get(run.step, {}))
    return planned


def test_normals_are_of_nih_and_chexpert_and_covid_of_ieee8023(carried_out):
    tables = read_prepared(carried_out["prepare"].folder)
    images = tables["images"]
    counts = images.groupby("source").diagnosis.value_counts()
    assert counts["nih"].to_dict() == {"normal": 8} and counts["chexpert"].to_dict() == {"normal": 7}
    assert set(counts["ieee8023"].index) == {"COVID-19", "normal"}
    assert images.age.dropna().min() >= 18 and set(images.image_id) == set(tables["folds"].id)


def test_the_published_folds_stand_above_each_fold_of_the_plans(carried_out):
    published = pd.read_csv(carried_out["report"].folder / "published.csv").set_index("table")
    folds = published.loc["hrnet_folds"]
    assert (folds["from"] == "published").sum() == 11  # ten folds and their mean
    ours = ["here", "here, fold 0", "here, fold 1", "here, mean of folds"]
    for model in ("masked", "whole"):
        assert folds["from"][folds.model == model].tolist() == ours
    assert published.loc["hrnet", "from"].value_counts().to_dict() == {"published": 4, "here": 2, "here, mean of folds": 2}


def test_the_figures_of_the_paper_are_drawn(carried_out):
    figures = {
        "segment_lungs": {"mean_curves"},  # figure 10
        "lungs": {"clean_up"},  # figure 6
        "report": {"extreme_folds", "heat_maps"},  # figures 13 and 14, 9 and 12
    }
    for name, expected in figures.items():
        assert {path.stem for path in (carried_out[name].folder / "figures").glob("*.png")} >= expected

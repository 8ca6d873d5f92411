"""Which models, ensembles and segmenters the system of a run has, and which run is chosen; no model is loaded."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kitlib.atomic import write_json
from kitlib.bundle import read_record
from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import SIIM_COVID19, SiimFusion
from kitlib.competitions.vinbigdata import VINBIGDATA
from kitlib.errors import RunError, RunNotFound
from kitlib.fusion.ensemble_bundle import Ensemble, write_ensemble
from kitlib.fusion.model_fusion import write_settings
from kitlib.inference.predict_files import table_columns
from kitlib.inference.systems import System, build_system, find_segmenters, find_system, read_system
from kitlib.lungs.finders import segmenter_digest
from kitlib.models.classifier import OUTPUTS
from kitlib.runs.run_kinds import KINDS
from tests.small_bundles import edit_record
from tests.small_kernels import make_run
from tests.small_systems import describe_model

STUDY = {"model": "study", "classes": OUTPUTS}
BOXES = {"model": "boxes", "family": "yolo"}
FINDINGS = {"model": "findings", "family": "findings", "classes": ["ill", "well"]}
SEGMENTER = {"model": "unet", "family": "segmenter", "classes": ["lungs"]}
FUSION = SiimFusion()


def write_run(folder, kind, bundles=None, parameters=None) -> Path:
    """Write a finished run of a kind; `bundles` maps its subfolders, such as "fold0", to what `make_run` writes there."""
    for name, keys in (bundles or {}).items():
        make_run(folder / name, **keys)
    mark = folder / KINDS[kind][0]
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    write_json(folder / "metrics.json", {})
    if parameters is not None:
        write_json(folder / "record.json", {"parameters": parameters})
    return folder


def write_stack(folder, learners, classes, key, **parameters) -> Path:
    """Write the run of a mean of `learners`."""
    write_run(folder, "ensemble", parameters=parameters)
    write_ensemble(folder / "ensemble", Ensemble("mean", "mean", tuple(learners), tuple(classes), key))
    return folder


def with_masks(segmenter, **keys):
    """Return what `make_run` writes for a model that was trained on the masks of the segmenter in the folder `segmenter`."""
    digest = segmenter_digest(read_record(segmenter / "bundle"))
    return {**keys, "architecture": {"segmenter": digest}, "lungs": "masks", "views": ["lungs"]}


def folders_of(system, root):
    """Return the folders of a system's models, without "/bundle", as paths below `root`."""
    return [model.folder.parent.relative_to(root).as_posix() for model in system.models]


def test_a_system_has_what_its_models_have():
    study = describe_model("study", "study", "none", classes=OUTPUTS)
    one = describe_model("one", "boxes", classes=("b", "a"), longest_side=128)
    two = describe_model("two", "boxes", classes=("c", "a"), longest_side=32)
    system = System("all", (two, study, one, two))
    assert (system.longest_side, system.answers) == (128, {"study", "none", "boxes"})
    assert (system.detectors, system.findings) == (("two", "one"), ("a", "b", "c"))
    assert (system.classes("boxes"), system.classes("study"), system.classes()) == (["c", "a", "b"], list(OUTPUTS), [])
    alone = system.with_detector("one")
    assert (alone.name, alone.models) == ("one", (study, one)) and system.name == "all"


@pytest.mark.parametrize(
    ("answers_and_classes", "fills"),
    [
        ([(("study", "none"), OUTPUTS)], True),
        ([(("none",), OUTPUTS), (("boxes",), ["opacity"])], True),
        ([(("boxes",), ["opacity"])], False),  # RSNA's detectors have this finding, too
        ([(("study", "none"), OUTPUTS), (("boxes",), ["ILD"])], False),
        ([(("study", "none"), OUTPUTS), (("classes",), ["opacity"])], False),
    ],
)
def test_study_models_fill_siims_submission_with_boxes_of_its_finding_alone(answers_and_classes, fills):
    models = (describe_model("m", *answers, classes=classes) for answers, classes in answers_and_classes)
    assert System("all", tuple(models)).fills_siim is fills


def test_a_segmenters_run_is_its_first_fold_or_all_if_the_structure_is_sparse(tmp_path):
    bundles = {"fold1": SEGMENTER | {"fold": 1}, "fold0": SEGMENTER, "fold2": SEGMENTER | {"fold": 2}}
    run = write_run(tmp_path / "lungs", "lungs", bundles)
    system = read_system(run, "lungs", {}, {})
    assert (folders_of(system, run), system.lungs, system.name) == (["fold0"], run / "fold0" / "bundle", "lungs")
    assert system.notes == tuple(f"{name} is left out: one segmenter draws the masks." for name in ("fold1", "fold2"))
    sparse = {"model": "caps", "family": "sparse_segmenter", "classes": ["pneumothorax"]}
    run = write_run(tmp_path / "caps", "masks", {"fold0": sparse, "fold1": sparse | {"fold": 1}})
    system = read_system(run, "masks", {}, {})
    assert (folders_of(system, run), system.lungs, system.notes) == (["fold0", "fold1"], None, ())
    with pytest.raises(RunError, match=r"empty has no trained model \(fold\*/bundle\)"):
        read_system(write_run(tmp_path / "empty", "lungs"), "lungs", {}, {})


def test_a_runs_own_bundle_stands_for_those_of_its_folds(tmp_path):
    nested = {"fold0": STUDY, "outer1/fold0": STUDY | {"fold": 1}, "outer0/fold1": STUDY | {"fold": 2}}
    run = write_run(tmp_path / "study", "study", nested)
    # In the order of the folds in the records.
    assert folders_of(read_system(run, "study", {}, {}), run) == ["fold0", "outer1/fold0", "outer0/fold1"]
    make_run(run, **STUDY)
    assert folders_of(read_system(run, "study", {}, {}), run) == ["."]


def test_a_fusion_has_the_models_of_its_runs_and_its_settings(tmp_path):
    one = write_run(tmp_path / "one", "study", {"fold0": STUDY, "fold1": STUDY | {"fold": 1}})
    two = write_run(tmp_path / "two", "detector", {"fold0": BOXES})
    write_stack(tmp_path / "stack", ["study"], STUDY_CLASSES, "study_id")
    write_run(tmp_path / "unused", "study", {"fold0": STUDY | {"model": "unused"}})
    fuse = write_run(tmp_path / "fuse", "fusion", parameters={"runs": ["one", str(two)], "study_ensemble": "stack"})
    settings = SiimFusion(none_no_box=0.5, box_iou=0.4)
    write_settings(settings, fuse / "fusion.json")
    system = find_system(fuse)
    # The first folds of all models come before the second ones, as in a submission.
    assert (system.name, folders_of(system, tmp_path)) == ("fuse: one + two", ["one/fold0", "two/fold0", "one/fold1"])
    assert (system.fusion, system.settings, system.competition) == (settings, settings, SIIM_COVID19)
    assert (system.ensemble, system.lungs, system.notes) == (tmp_path / "stack" / "ensemble", None, ())
    assert system.fills_siim and not replace(system, competition=VINBIGDATA).fills_siim
    write_json(
        fuse / "record.json", {"parameters": {"runs": [str(one)], "competition": "siim-covid19", "study_ensemble": ""}}
    )
    system = find_system(fuse)
    assert (system.name, system.ensemble) == ("fuse: one", None)


def test_a_fusion_for_another_competition_has_its_findings_classes_and_settings(tmp_path):
    write_run(tmp_path / "boxes", "detector", {"fold0": BOXES | {"classes": ["ILD", "Cardiomegaly"]}})
    write_run(tmp_path / "normal", "findings", {"fold0": FINDINGS | {"classes": ["No finding", "other"]}})
    parameters = {"runs": ["boxes", "normal"], "competition": "vinbigdata"}
    fuse = write_run(tmp_path / "fuse", "fusion", parameters=parameters)
    settings = VINBIGDATA.settings(box_iou=0.4, model_weights={"boxes": 2.0})
    write_settings(settings, fuse / "fusion.json", VINBIGDATA)
    system = find_system(fuse)
    assert (system.competition, system.settings) == (VINBIGDATA, settings)
    # Predictions are merged in the same way, but nothing of SIIM's decisions is tuned.
    assert system.fusion == SiimFusion(box_iou=0.4, model_weights={"boxes": 2.0})
    columns = ["file", "image_id", "study_id", "none", "No finding", "other", "boxes", "warning", "error"]
    assert table_columns(system) == columns


def test_runs_that_were_moved_together_are_found_beside_each_other(tmp_path):
    runs = write_run(tmp_path / "old" / "one", "study", {"fold0": STUDY}).parent
    fuse = write_run(runs / "fuse", "fusion", parameters={"runs": [str(runs / "one")]})
    write_settings(FUSION, fuse / "fusion.json")
    shutil.copytree(runs, tmp_path / "new")
    # Both folders exist, and each fusion has its neighbour.
    for folder in (runs, tmp_path / "new"):
        assert folders_of(find_system(folder / "fuse"), folder) == ["one/fold0"]
    shutil.rmtree(tmp_path / "new" / "one")
    assert folders_of(find_system(tmp_path / "new" / "fuse"), runs) == ["one/fold0"]
    shutil.rmtree(runs / "one")
    for name in (str(runs / "one"), 5):
        write_json(fuse / "record.json", {"parameters": {"runs": [name]}})
        with pytest.raises(RunError, match=re.escape(f"fuse combines the run {name}, which was not found; copy it to")):
            find_system(fuse)


def test_bundles_that_cannot_be_combined_are_left_out_and_noted(tmp_path):
    one = write_run(tmp_path / "one", "study", {"fold0": STUDY, "fold1": STUDY | {"fold": 1, "classes": ["a"]}})
    two = write_run(tmp_path / "two", "study", {"fold0": STUDY, "fold2": STUDY | {"fold": 2}})
    three = write_run(tmp_path / "three", "findings", {"fold0": FINDINGS})
    system = build_system("all", [one, two, three], FUSION, None, {})
    assert folders_of(system, tmp_path) == ["one/fold0", "two/fold2"]
    assert [note.split(":")[0] for note in system.notes] == [
        f"{name} is left out" for name in ("one/fold1", "two/fold0", "three/fold0")
    ]
    assert system.notes[1] == "two/fold0 is left out: one also has fold 0 of study."
    assert system.notes[2].endswith("findings predicts classes, which cannot be fused with study scores and boxes.")
    with pytest.raises(RunError, match=r"no trained study model or detector in .*three \(1 bundles cannot be used; three/"):
        build_system("all", [three], FUSION, None, {})
    with pytest.raises(RunError, match="no trained study model or detector found; "):
        build_system("all", [], FUSION, None, {})
    # A competition's system has any model that its submission can use, and no other.
    boxes = write_run(tmp_path / "boxes", "detector", {"fold0": BOXES | {"classes": ["ILD"]}})
    normal = write_run(tmp_path / "normal", "findings", {"fold0": FINDINGS | {"classes": ["No finding"]}})
    system = build_system("all", [one, boxes, normal, three], FUSION, None, {}, VINBIGDATA)
    assert folders_of(system, tmp_path) == ["boxes/fold0", "normal/fold0"] and len(system.notes) == 3


def test_an_ensemble_of_classifiers_has_all_their_folds(tmp_path):
    nested = {"outer0/fold1": FINDINGS, "outer1/fold1": FINDINGS}
    write_run(tmp_path / "one", "findings", {"fold0": FINDINGS, "fold1": FINDINGS | {"fold": 1}})
    write_run(tmp_path / "two", "findings", nested)
    stack = write_stack(tmp_path / "stack", ["findings"], ["ill", "well"], "image_id", runs=["one", "two"])
    system = find_system(stack)
    folders = ["one/fold0", "one/fold1", "two/outer0/fold1", "two/outer1/fold1"]
    assert (system.name, folders_of(system, tmp_path)) == ("stack: one + two", folders)
    assert system.ensemble == stack / "ensemble"
    edit_record(tmp_path / "two" / "outer1" / "fold1" / "bundle", classes=["well", "ill"])
    with pytest.raises(RunError, match=r"stack: one \+ two: .*one/fold0/bundle and .*outer1/fold1/bundle have different"):
        find_system(stack)
    write_run(tmp_path / "boxes", "detector", {"fold0": BOXES})
    write_json(stack / "record.json", {"parameters": {"runs": ["one", "boxes"]}})
    with pytest.raises(RunError, match=r"no trained classifiers .* in: [^,]*boxes$"):
        find_system(stack)
    with pytest.raises(RunError, match=r"no trained classifiers .* in: .*untrained$"):
        find_system(write_run(tmp_path / "untrained", "findings"))


def test_an_ensemble_of_study_models_has_one_model_of_each_fold(tmp_path):
    write_run(tmp_path / "one", "study", {"fold0": STUDY})
    write_run(tmp_path / "two", "study", {"fold0": STUDY})
    stack = write_stack(tmp_path / "stack", ["study"], STUDY_CLASSES, "study_id", runs=["one", "two"])
    system = find_system(stack)
    assert folders_of(system, tmp_path) == ["one/fold0"] and system.notes[0].startswith("two/fold0 is left out")
    assert system.ensemble == stack / "ensemble"


@pytest.mark.parametrize("parameters", [{}, {"runs": []}, None])
def test_a_combination_without_its_runs_is_refused(tmp_path, parameters):
    fuse = write_run(tmp_path / "fuse", "fusion", parameters=parameters)
    with pytest.raises(RunError, match=r"the parameter `runs` in .*record\.json must list the runs that .*fuse combines"):
        find_system(fuse)
    write_json(fuse / "record.json", {"parameters": None})
    with pytest.raises(RunError, match="the parameter `runs`"):
        find_system(fuse)


@pytest.mark.parametrize("text", ["{", "[]", '{"parameters": 5}'])
def test_a_damaged_record_is_an_error(tmp_path, text):
    run = write_run(tmp_path / "study", "study", {"fold0": STUDY})
    (run / "record.json").write_text(text)
    with pytest.raises(RunError, match=r"study/record\.json cannot be read .* repeat its notebook"):
        find_system(run)


def test_models_get_the_segmenter_of_their_training(tmp_path):
    first = make_run(tmp_path / "first", **SEGMENTER)
    second = make_run(tmp_path / "second", **SEGMENTER, dilations=3)
    segmenters = find_segmenters([("lungs", first), ("lungs", second)])
    assert list(segmenters.values()) == [first / "bundle", second / "bundle"]
    plain = write_run(tmp_path / "plain", "detector", {"fold0": BOXES})
    masked = write_run(tmp_path / "masked", "study", {"fold0": with_masks(second, **STUDY)})
    other = write_run(tmp_path / "other", "study", {"fold0": with_masks(first, **STUDY | {"model": "other"})})
    assert build_system("all", [plain, masked], FUSION, None, segmenters).lungs == second / "bundle"
    # Models that need none may show the lungs of any.
    assert build_system("all", [plain], FUSION, None, segmenters).lungs == first / "bundle"
    assert build_system("all", [plain], FUSION, None, {}).lungs is None
    assert build_system("all", [masked], FUSION, None, {"another": first}).lungs is None
    with pytest.raises(RunError, match="all: the models need 2 lung segmenters, but only one can be used"):
        build_system("all", [masked, other], FUSION, None, segmenters)
    with pytest.raises(RunError, match="all: the models need 2 lung segmenters"):
        build_system("all", [masked, other, plain], FUSION, None, {})


def test_of_one_segmenter_the_run_that_has_applied_it_is_preferred(tmp_path, caplog):
    trained = write_run(tmp_path / "trained", "lungs", {"fold0": SEGMENTER})
    applied = make_run(tmp_path / "applied", **SEGMENTER)
    damaged = make_run(tmp_path / "damaged", **SEGMENTER, dilations=3)
    (damaged / "bundle" / "model.json").write_text("{")
    boxes = make_run(tmp_path / "boxes", **BOXES)
    runs = [("lungs", trained), ("applied lungs", damaged), ("applied lungs", applied), ("lungs", boxes), ("study", trained)]
    assert list(find_segmenters(iter(runs)).values()) == [applied / "bundle"]
    assert f"the lung segmenter {damaged / 'bundle'} cannot be read and is not used" in caplog.text


def test_a_segmenter_elsewhere_is_found_by_the_parameter_of_the_training(tmp_path):
    lungs = write_run(tmp_path / "elsewhere" / "lungs", "applied lungs", {"": SEGMENTER})
    bundles = {"fold0": with_masks(lungs, **STUDY)}
    study = write_run(tmp_path / "runs" / "study", "study", bundles, {"lungs_run": str(lungs)})
    assert find_system(study).lungs == lungs / "bundle"
    fuse = write_run(tmp_path / "runs" / "fuse", "fusion", parameters={"runs": ["study"]})
    write_settings(FUSION, fuse / "fusion.json")
    assert find_system(fuse).lungs == lungs / "bundle"
    write_json(study / "record.json", {"parameters": {"lungs_run": ""}})
    with pytest.raises(RunError, match=r"need the masks of the segmenter.*no run next to .*fuse contains this segmenter"):
        find_system(fuse)
    shutil.copytree(lungs, tmp_path / "runs" / "lungs")
    assert find_system(fuse).lungs == tmp_path / "runs" / "lungs" / "bundle"


def test_a_run_that_predicts_nothing_is_named_by_its_kind(tmp_path):
    for kind in ("prepared", "report"):
        with pytest.raises(RunError, match=f"is a run of the kind '{kind}', which predicts nothing"):
            find_system(write_run(tmp_path / kind, kind))
    (tmp_path / "odd").mkdir()
    write_json(tmp_path / "odd" / "metrics.json", {})
    with pytest.raises(RunError, match="odd is a run of an unknown kind, which predicts nothing"):
        find_system(tmp_path / "odd")
    listing = r"found: odd \(other\), prepared \(prepared\), report \(report\)\. `make demo`"
    with pytest.raises(RunError, match=f"has no finished run that can predict; {listing}"):
        find_system(tmp_path)


def test_an_unfinished_run_is_not_chosen(tmp_path):
    write_run(tmp_path / "boxes", "detector", {"fold0": BOXES})
    fuse = write_run(tmp_path / "fuse", "fusion", parameters={"runs": ["boxes"]})
    (fuse / "metrics.json").unlink()
    assert find_system(tmp_path).name == "boxes"
    with pytest.raises(RunError, match=r"fuse/metrics\.json is missing"):
        find_system(fuse)


def test_of_several_runs_the_fusion_is_chosen_or_else_the_ensemble_the_only_model_or_the_segmenter(tmp_path):
    write_run(tmp_path / "lungs", "lungs", {"fold0": SEGMENTER})
    assert find_system(tmp_path).name == "lungs"
    write_run(tmp_path / "boxes", "detector", {"fold0": BOXES})
    assert find_system(tmp_path).name == "boxes"
    write_run(tmp_path / "study", "study", {"fold0": STUDY})
    with pytest.raises(RunError, match=r"2 runs in .* can predict(?s:.)*boxes \(detector\)(?s:.)*study \(study\)"):
        find_system(tmp_path)
    write_stack(tmp_path / "stack", ["study"], STUDY_CLASSES, "study_id", runs=["study"])
    assert find_system(tmp_path).name == "stack: study"
    fuse = write_run(tmp_path / "fuse", "fusion", parameters={"runs": ["study", "boxes"]})
    write_settings(FUSION, fuse / "fusion.json")
    assert find_system(tmp_path).name == "fuse: study + boxes"


def test_a_run_is_found_by_its_name_or_named_in_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr("kitlib.paths.runs_root", lambda: tmp_path)
    write_run(tmp_path / "boxes", "detector", {"fold0": BOXES})
    assert find_system("boxes").detectors == ("boxes",)
    with pytest.raises(RunNotFound, match="no run 'gone'"):
        find_system("gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no finished run that can predict; found: no run"):
        find_system(tmp_path / "empty")

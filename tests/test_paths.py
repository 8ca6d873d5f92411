import pytest

from kitlib import paths
from kitlib.errors import BundleError, InputNotFound, RunNotFound
from kitlib.paths import find_input, find_run, find_starting_weights
from kitlib.phantom_marker import holds_phantoms
from kitlib.phantoms.lungs import write_lungs
from kitlib.phantoms.siim import write_competition


@pytest.mark.parametrize(
    "layout",
    [
        "weights",
        "competitions/weights",
        "datasets/somebody/weights",
        "datasets/organizations/somebody/weights",
        "datasets/somebody/saved/weights",
        "kernel/weights",
        "notebooks/somebody/kernel/weights",
    ],
)
def test_an_input_is_found_in_all_of_kaggles_mount_layouts(tmp_path, layout):
    (tmp_path / layout).mkdir(parents=True)
    assert find_input("weights", tmp_path) == tmp_path / layout


@pytest.mark.parametrize("layout", ["weights", "datasets/somebody/weights", "datasets/organizations/somebody/weights"])
def test_the_owner_may_precede_and_a_folder_may_follow_the_slug_in_every_mount_layout(tmp_path, layout):
    (tmp_path / layout / "inner").mkdir(parents=True)
    assert find_input("somebody/weights", tmp_path) == tmp_path / layout
    assert (
        find_input("weights/inner", tmp_path)
        == find_input("somebody/weights/inner", tmp_path)
        == tmp_path / layout / "inner"
    )


def test_an_input_of_that_name_comes_before_a_folder_in_another_input(tmp_path):
    """The set nikhilpandey360/chest-xray-masks-and-labels has a folder data, like the slug of NIH's set."""
    for layout in ("datasets/nikhil/chest-xray-masks/data", "datasets/organizations/nih-chest-xrays/data"):
        (tmp_path / layout).mkdir(parents=True)
    assert find_input("data", tmp_path) == tmp_path / "datasets/organizations/nih-chest-xrays/data"
    assert find_input("nih-chest-xrays/data", tmp_path) == find_input("data", tmp_path)
    assert find_input("chest-xray-masks/data", tmp_path) == tmp_path / "datasets/nikhil/chest-xray-masks/data"


def test_a_folder_of_images_in_an_input_is_no_run_and_an_empty_name_no_input(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    (tmp_path / "inputs" / "only" / "train").mkdir(parents=True)
    with pytest.raises(RunNotFound, match="no run 'train'"):
        find_run("train")
    with pytest.raises(InputNotFound, match="the name of the input is empty"):
        find_input("", tmp_path / "inputs")


def test_two_inputs_of_one_name_are_an_error_that_lists_them(tmp_path):
    for owner in ("a", "b"):
        (tmp_path / "datasets" / owner / "weights").mkdir(parents=True)
    with pytest.raises(InputNotFound, match=r"2 inputs are called 'weights'.*OWNER/SLUG.*\n  datasets/a/weights\n"):
        find_input("weights", tmp_path)
    assert find_input("b/weights", tmp_path) == tmp_path / "datasets/b/weights"


def test_a_weights_file_that_two_inputs_have_is_an_error_that_lists_both(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    files = [tmp_path / "inputs" / "datasets" / owner / "weights" / "a.safetensors" for owner in ("me", "other")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    with pytest.raises(BundleError, match=f"2 inputs have weights/a.safetensors: {files[0]}, {files[1]}; .*OWNER/"):
        find_starting_weights("weights/a.safetensors")
    assert find_starting_weights("other/weights/a.safetensors") == files[1]


@pytest.mark.parametrize("layout", ["", "notebooks/somebody/"])
def test_a_kernels_name_selects_between_runs_of_the_same_name(tmp_path, layout):
    for kernel in ("first", "second"):
        (tmp_path / layout / kernel / "study").mkdir(parents=True)
    assert find_input("second/study", tmp_path) == tmp_path / layout / "second" / "study"


def test_a_missing_input_is_an_error_that_lists_the_available_ones(tmp_path):
    (tmp_path / "competitions" / "other").mkdir(parents=True)
    with pytest.raises(InputNotFound, match=r"no input 'weights'.*Available:\n  competitions/other$"):
        find_input("weights", tmp_path)


def test_a_run_is_read_from_the_runs_folder_or_else_from_an_input(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    (tmp_path / "inputs" / "study").mkdir(parents=True)
    assert find_run("study") == tmp_path / "inputs" / "study"
    (tmp_path / "runs" / "study").mkdir(parents=True)
    assert find_run("study") == tmp_path / "runs" / "study"
    assert find_run(tmp_path / "inputs" / "study") == tmp_path / "inputs" / "study"


def test_a_missing_run_is_named_with_the_runs_that_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    monkeypatch.setenv("KIT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    with pytest.raises(RunNotFound, match=r"no run 'prepair'; .*\n  none below"):
        find_run("prepair")
    for folder in ("runs/prepare", "runs/demo/study", "inputs/kernel/fuse"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "record.json").write_text("{}")
    message = rf"no run 'prepair'; execute notebook 10_prepare .*\n  demo/study\n  prepare\n  {tmp_path}/inputs/kernel/fuse$"
    with pytest.raises(RunNotFound, match=message):
        find_run("prepair", "notebook 10_prepare")


def test_phantoms_are_read_by_their_path_and_never_for_want_of_the_real_data(tmp_path):
    phantoms = write_lungs(tmp_path / "demo", "montgomery", images=4, side=64, seed=1, workers=1, progress=False)
    with pytest.raises(InputNotFound, match=rf"no input 'montgomery' .*, only phantoms .* in {phantoms}"):
        find_input("montgomery", tmp_path)
    assert find_input("demo/montgomery", tmp_path) == find_input(phantoms) == phantoms
    # Real data that comes later in the search, and real data next to phantoms of another set.
    for folder in ("datasets/someone/montgomery", "demo/jsrt"):
        (tmp_path / folder).mkdir(parents=True)
    assert find_input("montgomery", tmp_path) == tmp_path / "datasets" / "someone" / "montgomery"
    assert find_input("jsrt", tmp_path) == tmp_path / "demo" / "jsrt"


def test_real_data_unpacked_over_phantoms_is_real(tmp_path):
    sizes = {"train_studies": 4, "test_studies": 4, "side": 32, "seed": 1, "damaged_test_files": 0}
    folder = write_competition(tmp_path, tmp_path / "truth", **sizes, workers=1, progress=False)
    assert holds_phantoms(folder)
    (folder / "train_image_level.csv").write_text("id,boxes,label,StudyInstanceUID\n")
    assert not holds_phantoms(folder)


@pytest.mark.parametrize("damaged", ["{", "[]", "1"])
def test_a_damaged_marker_is_ignored_with_a_warning(tmp_path, caplog, damaged):
    phantoms = write_lungs(tmp_path, "montgomery", images=4, side=64, seed=1, workers=1, progress=False)
    (tmp_path / ".phantom.json").write_text(damaged)  # a marker that sets of phantoms share
    assert holds_phantoms(phantoms) and str(tmp_path / ".phantom.json") in caplog.text
    (tmp_path / ".montgomery.json").write_text(damaged)
    assert not holds_phantoms(phantoms)

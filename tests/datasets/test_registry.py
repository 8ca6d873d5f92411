"""What all readers have in common, and several data sets that are read together, each with a source of its own."""

import inspect

import cv2
import numpy as np
import pytest

from kitlib.datasets.mask_file import fill_masks
from kitlib.datasets.pool import read_mask_pool, read_pool
from kitlib.datasets.registry import READERS, read_dataset, read_parts
from kitlib.datasets.siim import read_test
from kitlib.errors import DatasetError, SettingsError


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_names_a_folder_that_is_missing(read, tmp_path):
    with pytest.raises(DatasetError, match="nowhere is not a folder"):
        read(tmp_path / "nowhere")


def test_functions_that_read_images_show_their_progress_by_default():
    for function in (*READERS.values(), read_dataset, read_parts, read_pool, read_mask_pool, read_test, fill_masks):
        assert inspect.signature(function).parameters["progress"].default is True


def test_parts_may_have_other_sources_and_parameters_of_own_images_go_only_to_these(tmp_path):
    for name in ("covidgr/P/1.png", "covidgr/N/1.png", "mine/A/1.png", "mine/B/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((8, 9), np.uint8))
    parts = {"covidgr": tmp_path / "covidgr", "table": tmp_path / "mine"}
    sets = read_parts(parts, False, {"covidgr": "hospital"}, class_folders=True)
    assert list(sets) == ["covidgr", "table"]
    assert sets["covidgr"].images[["source", "patient_id"]].to_numpy().tolist() == [
        ["hospital", "hospital-covidgr-N-1"],
        ["hospital", "hospital-covidgr-P-1"],
    ]
    assert set(sets["table"].images.source) == {"mine"} and list(sets["table"].labels) == ["id", "A", "B"]
    with pytest.raises(SettingsError, match="remove 'rsna' from `sources`: the data sets to read are covidgr, table"):
        read_parts(parts, False, {"rsna": "hospital", "covidgr": "hospital"})
    # Parameters that are not set are empty, and do not matter.
    assert len(read_dataset("covidgr", tmp_path / "covidgr", False, class_folders=False, table="").images) == 2
    with pytest.raises(SettingsError, match="class_folders can only be set for your own images"):
        read_parts({"covidgr": tmp_path / "covidgr"}, False, class_folders=True, table="")

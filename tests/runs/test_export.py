"""A prepared run exported as COCO or YOLO files is imported as the same boxes."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from kitlib.__main__ import app
from kitlib.atomic import write_json
from kitlib.datasets.folds import make_folds
from kitlib.datasets.rsna import read_rsna
from kitlib.errors import DatasetError
from kitlib.phantoms.challenges import write_challenge
from kitlib.runs.export import export_run, import_tables
from kitlib.tables import read_table, write_table
from kitlib.xrays.image_file import decode_image


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The run folder and tables of notebook 10 for twelve phantoms, one of which no annotator looked at."""
    folder = tmp_path_factory.mktemp("run")
    data = read_rsna(
        write_challenge(folder, "rsna-pneumonia", images=12, side=32, seed=0, workers=1, progress=False), progress=False
    )
    normal = data.labels.id[data.labels["Normal"] == 1].iloc[0]
    images = data.images.assign(false_none=data.images.image_id == normal)
    tables = {"images": images, "labels": data.labels, "boxes": data.boxes}
    tables["folds"] = make_folds(images[~images.false_none], data.labels, data.boxes, 2)
    for name, table in tables.items():
        write_table(table, name, folder / "tables" / f"{name}.parquet")
    write_json(folder / "metrics.json", {})
    return folder, tables


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_coco_and_back(prepared, tmp_path):
    folder, tables = prepared
    result = run("export", "--run", folder, "--format", "coco", "--out", tmp_path / "coco")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads((tmp_path / "coco" / "annotations.json").read_text())["images"]) == 11
    source = tmp_path / "coco" / "annotations.json"
    result = run("import", "--format", "coco", "--source", source, "--out", tmp_path / "tables")
    assert result.exit_code == 0, result.stderr
    for name in ("boxes", "folds"):
        imported = read_table(name, tmp_path / "tables" / f"{name}.parquet").sort_values(
            list(tables[name]), ignore_index=True
        )
        pd.testing.assert_frame_equal(imported, tables[name].sort_values(list(tables[name]), ignore_index=True))
    with_run = run("import", "--run", folder, "--format", "coco", "--source", source, "--out", tmp_path / "again")
    assert with_run.exit_code == 0, with_run.stderr
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["boxes.parquet"]


def test_yolo_with_images_and_back(prepared, tmp_path):
    folder, tables = prepared
    result = run("export", "--run", folder, "--format", "yolo", "--out", tmp_path, "--images")
    assert result.exit_code == 0, result.stderr
    images = {path.stem: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (tmp_path / "images").iterdir()}
    assert set(images) == {path.stem for path in (tmp_path / "labels").iterdir()} and len(images) == 11
    assert all(pixels.shape == (32, 32) and pixels.dtype == np.uint8 for pixels in images.values())
    source = tables["boxes"].image_id.iloc[0]
    pixels_again = decode_image(tmp_path / "images" / f"{source}.png").pixels
    np.testing.assert_array_equal(pixels_again, images[source])
    row_counts = import_tables(tmp_path, tmp_path / "tables", "yolo", folder)
    assert row_counts == {"boxes": len(tables["boxes"])}
    imported = read_table("boxes", tmp_path / "tables" / "boxes.parquet")
    pd.testing.assert_frame_equal(imported, tables["boxes"].sort_values("image_id", kind="stable", ignore_index=True))


def test_an_image_that_cannot_be_decoded_is_left_out_and_reported(prepared, tmp_path):
    _, tables = prepared
    lost = tables["boxes"].image_id.iloc[0]
    damaged = tables["images"].copy()
    (tmp_path / "damaged.dcm").write_bytes(b"no image")
    damaged.loc[damaged.image_id == lost, "path"] = str(tmp_path / "damaged.dcm")
    for name, table in (tables | {"images": damaged}).items():
        write_table(table, name, tmp_path / "run" / "tables" / f"{name}.parquet")
    write_json(tmp_path / "run" / "metrics.json", {})
    problems = export_run(tmp_path / "run", tmp_path / "out", "yolo", with_images=True, progress=False)
    assert len(problems) == 1 and problems[0].startswith(lost)
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 10
    write_table(damaged.assign(path="nowhere"), "images", tmp_path / "run" / "tables" / "images.parquet")
    with pytest.raises(DatasetError, match="no image could be decoded"):
        export_run(tmp_path / "run", tmp_path / "out2", "yolo", with_images=True, progress=False)


@pytest.mark.parametrize("with_images", [False, True])
def test_a_run_without_fully_annotated_images_has_nothing_to_export(prepared, tmp_path, with_images):
    _, tables = prepared
    for name, table in (tables | {"images": tables["images"].assign(false_none=True)}).items():
        write_table(table, name, tmp_path / "run" / "tables" / f"{name}.parquet")
    write_json(tmp_path / "run" / "metrics.json", {})
    with pytest.raises(DatasetError, match="run has no image whose boxes are all known"):
        export_run(tmp_path / "run", tmp_path / "out", "yolo", with_images=with_images, progress=False)
    assert not (tmp_path / "out").exists()


def test_wrong_calls(prepared, tmp_path):
    folder, _ = prepared
    for words in (("--format", "voc"), ()):
        assert run("export", "--run", folder, "--out", tmp_path, *words).exit_code == 2
    with pytest.raises(ValueError, match="'voc'; available: coco, yolo"):
        export_run(folder, tmp_path, "voc")
    result = run("import", "--format", "yolo", "--source", tmp_path, "--out", tmp_path)
    assert result.exit_code == 1 and "requires a prepared run" in result.stderr
    result = run("export", "--run", tmp_path, "--format", "coco", "--out", tmp_path)
    assert result.exit_code == 1 and "metrics.json is missing" in result.stderr

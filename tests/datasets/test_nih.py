"""NIH ChestX-ray14: findings, patients, official lists, boxes and faults."""

import numpy as np
import pytest
from PIL import Image

from kitlib.classes import NIH_FINDINGS
from kitlib.datasets.faults import Faults
from kitlib.datasets.folds import make_folds
from kitlib.datasets.nih import read_boxes, read_nih
from kitlib.datasets.registry import compare_with_published, read_dataset
from kitlib.errors import DatasetError
from tests import REAL_DATA

SHARED = REAL_DATA
# The header of the real Data_Entry_2017.csv splits its size columns at their commas.
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],"
    "OriginalImagePixelSpacing[x,y],"
)
ROWS = (
    "00000001_000.png,Cardiomegaly|Emphysema,0,1,58,M,PA,2682,2749,0.143,0.143,",
    "00000001_001.png,No Finding,1,1,58,M,AP,2682,2749,0.143,0.143,",
    "00000002_000.png,Hernia,0,2,81,F,PA,2500,2048,0.171,0.171,",
    "00000003_000.png,Cold,0,3,81,F,PA,2500,2048,0.171,0.171,",
    "00000004_000.png,No Finding,0,4,81,F,PA,2500,2048,0.171,0.171,",
)


@pytest.fixture
def layout(tmp_path):
    (tmp_path / "Data_Entry_2017.csv").write_text("\n".join([HEADER, *ROWS]))
    for place, number in (("images_001", 1), ("images_002", 2), ("images_002", 3)):
        folder = tmp_path / place / "images"
        folder.mkdir(parents=True, exist_ok=True)
        for follow_up in (0, 1) if number == 1 else (0,):
            Image.fromarray(np.zeros((30, 40), np.uint8)).save(folder / f"{number:08d}_{follow_up:03d}.png")
    (tmp_path / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "00000002_000.png,Infiltrate,256,512,512,256,,,\n"
        "00000001_000.png,Mass,a,1,2,3,,,\n"
    )
    (tmp_path / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    (tmp_path / "test_list.txt").write_text("00000002_000.png\n00000003_000.png\n")
    return tmp_path


def test_images_findings_patients_boxes_and_lists(layout):
    data = read_nih(layout, progress=False)
    assert data.images.image_id.tolist() == ["00000001_000", "00000001_001", "00000002_000"]
    assert data.images.patient_id.tolist() == ["nih-00000001", "nih-00000001", "nih-00000002"]
    assert data.images["view"].tolist() == ["PA", "AP", "PA"] and data.images.split.tolist() == ["train", "train", "test"]
    # The PNG's own size, not that of the film it was made from.
    assert set(data.images["rows"]) == {30} and set(data.images["columns"]) == {40}
    labels = data.labels.set_index("id")
    assert list(labels.columns) == list(NIH_FINDINGS)
    assert labels.loc["00000001_000"][labels.loc["00000001_000"] == 1].index.tolist() == ["Cardiomegaly", "Emphysema"]
    assert labels.loc["00000001_001"].sum() == labels.loc["00000001_001", "No Finding"] == 1
    # The list is of images of 1024 x 1024 pixels, this one has 40 x 30.
    assert data.boxes.to_dict("records") == [
        {"image_id": "00000002_000", "finding": "Infiltration", "xmin": 10, "ymin": 15, "xmax": 30, "ymax": 22.5}
    ]


def test_tables_saved_on_windows_are_read_alike(layout):
    expected = read_nih(layout, progress=False)
    for name in ("Data_Entry_2017.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt"):
        text = (layout / name).read_text().replace("0000000", "images\\0000000").replace("\n", "\r\n")
        (layout / name).write_text(text, encoding="utf-8-sig" if name.endswith("csv") else "utf-16", newline="")
    data = read_nih(layout, progress=False)
    assert data.images.equals(expected.images) and data.boxes.equals(expected.boxes) and data.labels.equals(expected.labels)


def test_what_is_broken_is_listed(layout):
    told = read_nih(layout, progress=False).faults.set_index("row").problem
    assert "the findings 'Cold' are not valid" in told["00000003_000"]
    assert "have no file" in told["00000004_000"]
    assert "not a number" in told["00000001_000"]


def test_an_image_in_neither_list_is_left_out(layout):
    (layout / "train_val_list.txt").write_text("00000001_000.png\n")
    data = read_nih(layout, progress=False)
    assert data.images.image_id.tolist() == ["00000001_000", "00000002_000"]
    assert set(data.labels.id) == set(data.images.image_id)
    assert data.faults.problem[data.faults.row == "00000001_001"].tolist() == [
        "and 0 other images are in neither of the official lists; left out"
    ]


@pytest.mark.parametrize(
    ("findings", "valid"),
    [("Mass", True), ("Mass|Hernia", True), ("No Finding", True), ("", False), ("No Finding|Mass", False), ("mass", False)],
)
def test_findings_are_of_the_list_and_no_finding_stands_alone(layout, findings, valid):
    table = (layout / "Data_Entry_2017.csv").read_text().replace("Cardiomegaly|Emphysema", findings)
    (layout / "Data_Entry_2017.csv").write_text(table)
    data = read_nih(layout, progress=False)
    assert ("00000001_000" in set(data.images.image_id)) == valid
    if valid:
        row = data.labels.set_index("id").loc["00000001_000"]
        assert set(row[row == 1].index) == set(findings.split("|"))


def test_without_a_valid_row_the_error_says_so(layout):
    path = layout / "Data_Entry_2017.csv"
    path.write_text("\n".join([HEADER, ROWS[3]]))
    with pytest.raises(DatasetError, match=r"no image can be used; .* the findings 'Cold' are not valid"):
        read_nih(layout, progress=False)


@pytest.mark.parametrize(
    ("cell", "age", "is_told"),
    [
        *[("58", 58, False), ("058Y", 58, False), ("", np.nan, False)],
        *[("011M", 0, False), ("012D", 0, False)],  # months and days, in the first release
        *[("412", np.nan, True), ("x", np.nan, True), ("5 M", np.nan, True)],
    ],
)
def test_ages_are_in_years(layout, cell, age, is_told):
    path = layout / "Data_Entry_2017.csv"
    path.write_text(path.read_text().replace("1,58,M,AP", f"1,{cell},M,AP"))
    data = read_nih(layout, progress=False)
    np.testing.assert_array_equal(data.images.age, [58, age, 81])
    assert data.images.sex.tolist() == ["M", "M", "F"]
    assert data.faults["row"][data.faults.problem.str.contains("the age is unknown")].tolist() == ["00000001_001"] * is_told


def test_a_table_without_ages_and_sexes_is_read(layout):
    path = layout / "Data_Entry_2017.csv"
    path.write_text(path.read_text().replace("Patient Age,Patient Gender", "a,b"))
    data = read_nih(layout, progress=False)
    assert set(data.images.sex) == {""} and data.images.age.isna().all()
    assert not data.faults.problem.str.contains("age is unknown").any()


def test_of_rows_with_one_image_the_first_counts_and_a_file_without_a_row_is_told(layout):
    expected = read_nih(layout, progress=False)
    path = layout / "Data_Entry_2017.csv"
    path.write_text(path.read_text() + "\n" + ROWS[0].replace("Cardiomegaly|Emphysema", "Mass").replace(",1,58", ",7,58"))
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(layout / "images_002" / "images" / "00000009_000.png")
    data = read_nih(layout, progress=False)
    assert data.images.equals(expected.images) and data.labels.equals(expected.labels)
    new = data.faults[~data.faults.problem.isin(expected.faults.problem)]
    assert new["row"].tolist() == ["00000001_000", "00000009_000"]
    assert "the first row is used" in new.problem.iloc[0] and "and 0 other files have no row" in new.problem.iloc[1]


def test_the_table_of_boxes_may_be_missing_but_not_lack_columns(layout):
    path = layout / "BBox_List_2017.csv"
    path.write_text("Image Index,Finding Label,x,y,w,h\n00000002_000.png,Mass,256,512,512,256\n")
    assert read_nih(layout, progress=False).boxes.finding.tolist() == ["Mass"]
    path.write_text("Image Index,Finding Label,x,y,w\n00000002_000.png,Mass,1,2,3\n")
    with pytest.raises(DatasetError, match=r"has the columns .*; x, y, width or height is missing"):
        read_nih(layout, progress=False)
    path.unlink()
    data = read_nih(layout, progress=False)
    assert data.boxes.empty and path.name in data.faults.file.tolist() and len(data.images) == 3


def test_test_images_are_in_no_fold(layout):
    for name in ("00000005_000", "00000006_000"):
        Image.fromarray(np.zeros((30, 40), np.uint8)).save(layout / "images_001" / "images" / f"{name}.png")
        with open(layout / "Data_Entry_2017.csv", "a") as table:
            table.write(f"\n{name}.png,Mass,0,{name[:8]},1,M,PA,1,1,1,1,")
        with open(layout / "train_val_list.txt", "a") as listed:
            listed.write(f"{name}.png\n")
    data = read_nih(layout, progress=False)
    folds = make_folds(data.images, data.labels, data.boxes, 3)
    assert set(folds.id) == {"00000001_000", "00000001_001", "00000005_000", "00000006_000"}


def test_without_lists_all_images_may_be_trained_on(layout):
    (layout / "test_list.txt").unlink()
    with pytest.raises(DatasetError, match=r"has only one of the two official lists: test_list\.txt is missing"):
        read_nih(layout, progress=False)
    (layout / "train_val_list.txt").unlink()
    data = read_nih(layout, progress=False)
    assert "split" not in data.images and "all images may be used for training" in " ".join(data.faults.problem)


@pytest.mark.parametrize("name", ["Data_Entry_2017.csv", "images_001"])
def test_a_missing_piece_names_itself_and_where_it_is_got(tmp_path, layout, name):
    (layout / name).rename(layout / "elsewhere") if name.endswith("csv") else None
    if name == "images_001":
        for image in layout.glob("images_*/images/*.png"):
            image.unlink()
    with pytest.raises(DatasetError, match=f"{name.removesuffix('.csv')}.*nih-chest-xrays/data"):
        read_nih(layout, progress=False)


def test_counts_stand_beside_the_published_ones(layout):
    data = read_dataset("nih", layout, progress=False)
    # Wang et al. 2017, the data set's FAQ, and the organisers' table of entries.
    counts = (11559, 2776, 13317, 19894, 5782, 6331, 1431, 5302, 4667, 2303, 2516, 1686, 3385, 227, 60361)
    published = {"images": 112120, "patients": 30805, "boxes": 984} | dict(zip(NIH_FINDINGS, counts, strict=True))
    assert data.published == published
    table = compare_with_published(data).set_index("what")
    assert table.here[["images", "studies", "patients", "boxes", "Hernia", "Mass"]].tolist() == [3, 3, 2, 1, 1, 0]
    assert table.here["faults"] == len(data.faults) and table.share["Hernia"] == round(1 / 227, 4)
    assert table.published[list(published)].tolist() == list(published.values()) and table.published.isna().sum() == 2
    with pytest.raises(ValueError, match="available: siim, nih, rsna"):
        read_dataset("padchest", layout)


@pytest.mark.real_data
def test_the_real_list_of_boxes():
    path = SHARED / "label_tables" / "nih_BBox_List_2017.csv"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    faults = Faults()
    boxes = read_boxes(path, faults)
    # 984 boxes on 880 images of 8 findings: Wang et al. 2017, section 3.3.
    assert len(boxes) == 984 and boxes.image_id.nunique() == 880 and boxes.finding.nunique() == 8 and not faults.rows
    assert set(boxes.finding) <= set(NIH_FINDINGS)

"""V7's set: matching annotations to images, frontal views only, masks from polygons or files, patients."""

import json

import numpy as np
import pytest
from PIL import Image

from kitlib.datasets.darwin import CLASSES, read_darwin
from kitlib.datasets.folds import make_folds
from kitlib.datasets.mask_file import fill_masks
from kitlib.errors import DatasetError
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.mask_store import MaskStore

ROWS, COLUMNS = 300, 400
AREAS = ((60, 240, 40, 180), (60, 240, 200, 360))


def polygon(top, bottom, left, right):
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return {"name": "Lung", "polygon": {"path": [{"x": x, "y": y} for x, y in corners]}}


LUNGS = [polygon(*area) for area in AREAS]


class Folder:
    def __init__(self, root):
        self.root = root

    def image(self, name, size=(ROWS, COLUMNS)):
        path = self.root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(size, 90, np.uint8)).save(path)

    def annotation(self, number, filename, original=None, tags=(), shapes=tuple(LUNGS), folder="all-images"):
        image = {"width": COLUMNS, "height": ROWS, "filename": filename, "original_filename": original or filename}
        told = {"image": image, "annotations": [*shapes, *({"name": tag, "tag": {}} for tag in tags)]}
        path = self.root / "annotations" / folder / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told))

    def mask(self, name, folder="annotations/all-images-semantic-masks"):
        mask = np.zeros((ROWS, COLUMNS), np.uint8)
        for top, bottom, left, right in AREAS:
            mask[top:bottom, left:right] = 255
        path = self.root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)

    def read(self):
        return read_darwin(self.root, progress=False)


@pytest.fixture
def darwin(tmp_path):
    """Three images in Darwin's layout: one with polygons, one with a semantic mask, one lateral."""
    folder = Folder(tmp_path)
    for number in (1, 2, 3):
        folder.image(f"0000000{number}.jpeg")
    folder.annotation(965322, "00000001.jpeg", "person1_virus_6.jpeg", ["Viral Pneumonia", "AP"])
    folder.annotation(965323, "00000002.jpeg", "person1_virus_7.jpeg", ["No Pneumonia (healthy)"], shapes=())
    folder.mask("965323.png")
    folder.annotation(965324, "00000003.jpeg", "a.jpeg", ["COVID-19", "Lateral"], shapes=())
    (tmp_path / "metadata.csv").write_text("patientid,filename\n7,a.jpeg\n7,b.png\n")
    return folder


def test_frontal_images_with_tags_and_masks(darwin):
    data = darwin.read()
    assert data.images.image_id.tolist() == ["00000001", "00000002"] and set(data.images.convention) == {"with_heart"}
    assert data.images["view"].tolist() == ["AP", ""]
    # Both are of Kermany's patient 1.
    assert data.images.patient_id.tolist() == ["kermany-person1"] * 2
    assert data.labels[list(CLASSES)].to_numpy().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert [path.rsplit("/", 1)[1] for path in data.masks.path] == ["965322.json", "965323.png"]
    assert data.faults.problem.tolist() == ["and 0 others are not frontal X-rays, according to their tags; left out"]
    assert data.faults.row.tolist() == ["00000003"]
    assert data.published == {"images": 6504}  # as stated in github.com/v7labs/covid-19-xray-dataset


def test_a_polygon_and_a_file_give_the_same_mask(darwin, tmp_path):
    data = darwin.read()
    cache, store = XrayCache(tmp_path / "xrays", 200), MaskStore(tmp_path / "store")
    cache.fill(data.images, workers=1)
    assert fill_masks(store, data.masks, data.images, cache, progress=False).empty
    expected = np.zeros((150, 200), np.uint8)
    for top, bottom, left, right in AREAS:
        expected[top // 2 : bottom // 2, left // 2 : right // 2] = 1
    for image_id in ("00000001", "00000002"):
        np.testing.assert_array_equal(store.read(image_id), expected)


@pytest.mark.parametrize(
    "tag", ["Lateral", "CT", "Axial", "X-ray lateral view", "Coronal CT"], ids=lambda tag: tag.replace(" ", "_")
)
def test_what_is_no_frontal_x_ray_is_left_out(darwin, tag):
    darwin.annotation(965322, "00000001.jpeg", tags=[tag])
    assert darwin.read().images.image_id.tolist() == ["00000002"]


def test_other_tags_leave_a_frontal_x_ray(darwin):
    darwin.annotation(965322, "00000001.jpeg", tags=["ICU Admission: yes", "Survival", "Bacterial Pneumonia", "AP Supine"])
    assert darwin.read().images["view"].tolist() == ["AP", ""]


def test_images_are_found_by_the_name_of_their_source_and_of_the_annotation(darwin):
    darwin.image("person9_bacteria_2.jpeg")
    darwin.annotation(1, "00000009.jpeg", "person9_bacteria_2.jpeg", ["Bacterial Pneumonia"])
    darwin.image("965400.png")
    darwin.annotation(965400, "00000010.jpeg", "b.png", ["COVID-19", "Viral Pneumonia"])
    images = darwin.read().images.set_index("image_id")
    assert images.patient_id["person9_bacteria_2"] == "kermany-person9" and images.patient_id["965400"] == "ieee8023-7"


def test_an_image_whose_patient_is_blank_is_its_own_patient(darwin):
    (darwin.root / "metadata.csv").write_text("patientid,filename\n,x.png\n ,y.png\n7 ,z.png\n")
    for name in "xyz":
        darwin.image(f"{name}.png")
    patients = darwin.read().images.set_index("image_id").patient_id
    assert patients[["x", "y", "z"]].tolist() == ["darwin-x", "darwin-y", "ieee8023-7"]


def test_a_side_may_have_256_pixels(darwin):
    darwin.image("least.png", (256, 256))
    darwin.image("narrow.png", (400, 255))
    assert darwin.read().images.image_id.tolist() == ["00000001", "00000002", "least"]


def test_images_and_masks_without_annotations(tmp_path):
    folder = Folder(tmp_path)
    for number in range(4):
        folder.image(f"{number}.png")
        folder.mask(f"{number}{'_mask' if number == 1 else ''}.png", "masks")
    data = folder.read()
    assert len(data.masks) == 4 and data.labels[list(CLASSES)].isna().all(axis=None)
    assert any("and 3 others have no annotation" in problem for problem in data.faults.problem)
    # Folds can be made although all classes are unknown.
    assert len(make_folds(data.images, data.labels, data.boxes, 2)) == 4


def test_what_is_broken_is_listed(darwin):
    darwin.image("small.png", (255, 400))
    darwin.annotation(1, "small.png")
    darwin.image("bare.png")
    darwin.annotation(2, "bare.png", tags=["COVID-19"], shapes=())
    darwin.annotation(3, "gone.png")
    darwin.annotation(965322, "00000001.jpeg", folder="covid-only")
    (darwin.root / "annotations" / "coco.json").write_text('{"images": [], "annotations": []}')
    (darwin.root / "images" / "text.png").write_text("no image")
    (darwin.root / "metadata.csv").unlink()
    data = darwin.read()
    assert data.images.image_id.tolist() == ["00000001", "00000002", "bare"]
    told = "\n".join(" ".join(row) for row in data.faults.to_numpy())
    for problem in (
        "small and 0 others have a side below 256 pixels; left out",
        "bare and 0 others have no mask",
        "3 and 0 others are annotations without an image; left out",
        "965322 and 0 others annotate an image that already has an annotation; left out",
        "metadata.csv  the file is missing; images of one patient",
    ):
        assert problem in told
    assert "coco.json" in told and "Darwin JSON 1.0 or 2.0" in told and "text.png text" in told
    assert data.labels["COVID-19"].tolist()[2] == 1


def test_a_missing_piece_names_itself_and_where_it_is_got(darwin):
    (darwin.root / "annotations").rename(darwin.root / "elsewhere_of_json")
    for path in darwin.root.rglob("*.json"):
        path.unlink()
    for path in darwin.root.rglob("9*.png"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"contains no lung mask.*darwin dataset pull"):
        darwin.read()
    (darwin.root / "metadata.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DatasetError, match=r"metadata\.csv lacks"):
        darwin.read()
    (darwin.root / "metadata.csv").unlink()
    images = [path for path in (darwin.root / "images").rglob("*") if path.is_file()]
    for path in images:
        path.write_bytes(b"no image")
    with pytest.raises(DatasetError, match="no frontal X-ray with at least 256 pixels"):
        darwin.read()
    for path in images:
        path.unlink()
    with pytest.raises(DatasetError, match=r"no PNG or JPEG image outside folders of masks.*darwin dataset pull"):
        darwin.read()


def test_kermanys_normal_images_of_one_patient_are_one_patient(tmp_path):
    names = ("IM-0011-0001", "IM-0011-0001-0002", "NORMAL2-IM-0173-0001-0001", "NORMAL2-IM-0173-0001-0002")
    folder = Folder(tmp_path)
    for number, name in enumerate(names):
        folder.image(f"{name}.jpeg")
        folder.annotation(number, f"{number:08d}.jpeg", f"{name}.jpeg", ["No Pneumonia (healthy)", "PA"])
    assert sorted(folder.read().images.patient_id.value_counts()) == [2, 2]

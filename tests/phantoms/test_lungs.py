"""Phantoms in the layouts with lung masks: they are read without faults, and their masks match the drawing."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from kitlib.classes import MASK_CODES
from kitlib.datasets.mask_file import fill_masks, read_mask
from kitlib.datasets.registry import read_dataset
from kitlib.phantoms.lungs import DARWIN_COUNTS, LAYOUTS, write_lungs
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.image_file import decode_image
from kitlib.xrays.mask_store import MaskStore

pytestmark = pytest.mark.usefixtures("quick_processes")
SIZES = {
    "jsrt": {"images": 3, "side": 320},
    "montgomery": {"images": 7, "side": 160},
    "shenzhen": {"images": 14, "side": 160},
    "darwin": {"images": 12, "side": 320},
}
COPY = 128  # longest side of the decoded copy


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {layout: write_lungs(folder, layout, **size, seed=3, workers=1, progress=False) for layout, size in SIZES.items()}


@pytest.fixture(scope="module")
def prepared(written, tmp_path_factory):
    """By layout: the data set, the decoded copy, the mask store and the masks' faults."""
    sets = {}
    for layout, folder in written.items():
        run, data = tmp_path_factory.mktemp(layout), read_dataset(layout, folder, progress=False)
        cache, store = XrayCache(run / "xrays", COPY), MaskStore(run / "masks")
        assert set(cache.fill(data.images, workers=1).status) == {"decoded"}
        faults = fill_masks(store, data.masks, data.images, cache, progress=False)
        sets[layout] = (data, cache, store, faults)
    return sets


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def test_readers_find_the_requested_images_and_masks(prepared):
    images = {layout: len(data.images) for layout, (data, *_) in prepared.items()}
    # One of Darwin's twelve is tagged as lateral.
    assert images == {"jsrt": 3, "montgomery": 7, "shenzhen": 14, "darwin": 11}
    masks = {layout: len(store) for layout, (_, _, store, _) in prepared.items()}
    # Shenzhen has 566 masks of 662 images: 14 x 566 / 662 = 11.97.
    assert masks == {"jsrt": 3, "montgomery": 7, "shenzhen": 11, "darwin": 11}
    assert all(faults.empty for *_, faults in prepared.values())
    problems = {layout: data.faults.problem.tolist() for layout, (data, *_) in prepared.items()}
    assert problems["jsrt"] == problems["montgomery"] == [] and problems["shenzhen"] == ["and 2 other images have no mask"]
    # As in the real set, the patients of COVID-19 images are unknown.
    assert len(problems["darwin"]) == 2
    assert "are not frontal X-rays" in problems["darwin"][0] and "one patient" in problems["darwin"][1]


def test_classes_have_the_published_shares(prepared):
    def counts(layout):
        labels = prepared[layout][0].labels
        return labels.drop(columns="id").sum().astype(int).tolist()

    # 154 and 93 of 247, times 3; 80 and 58 of 138, times 7; 326 and 336 of 662, times 14.
    assert counts("jsrt") == [2, 1] and counts("montgomery") == [4, 3] and counts("shenzhen") == [7, 7]
    # 1,583, 2,780, 1,493 and 517 of 6,373, times 12: 3.0, 5.2, 2.8, 1.0; each at least one, then by largest remainder.
    # The first image is tagged as lateral and therefore excluded; COVID-19 images are also labelled viral.
    assert counts("darwin") == [3 - 1, 5, 2 + 2, 2]
    images = prepared["montgomery"][0].images
    assert images.age.between(18, 89).all() and set(images.sex) == {"F", "M"}
    assert set(prepared["darwin"][0].images.convention) == {"with_heart"}


@pytest.mark.parametrize("layout", SIZES)
def test_lungs_are_dark_and_lie_in_their_masks(layout, prepared):
    """JSRT's raw files are inverted; the reader corrects this."""
    _, cache, store, _ = prepared[layout]
    darker = []
    for image_id in store.ids:
        pixels, codes = cache.read(image_id).pixels, store.read(image_id)
        assert codes.shape == pixels.shape
        lungs = np.isin(codes, [MASK_CODES[name] for name in ("lungs", "left_lung", "right_lung")])
        height, width = pixels.shape
        body = np.zeros_like(lungs)
        body[height // 4 : -height // 4, width // 4 : -width // 4] = True
        darker.append(np.median(pixels[body & ~lungs]) - np.median(pixels[lungs]))
        # Real ones fill 0.1 to 0.5 of an image.
        assert 0.1 < lungs.mean() < 0.5
    assert min(darker) > 20


def test_shapes_are_the_cached_copys_and_not_square(prepared):
    for layout in ("montgomery", "shenzhen", "darwin"):
        data, cache, _, _ = prepared[layout]
        shapes = {cache.read(image_id).pixels.shape for image_id in data.images.image_id}
        assert all(max(shape) == COPY > min(shape) for shape in shapes) and len({shape[0] == COPY for shape in shapes}) == 2


def test_jsrt_has_each_structure_at_its_side(prepared):
    _, _, store, _ = prepared["jsrt"]
    for image_id in store.ids:
        codes = store.read(image_id)
        columns = {name: np.nonzero(codes == MASK_CODES[name])[1].mean() for name in ("right_lung", "heart", "left_lung")}
        # Seen from the front, the patient's right is on the left.
        assert columns["right_lung"] < columns["heart"] < columns["left_lung"]
        assert 0.02 < (codes == MASK_CODES["heart"]).mean() < 0.12


def area_mean(mask, shape):
    """The exact mean of each pixel's area, by the overlap of intervals along either axis."""

    def overlaps(target, source):
        edge, inner = np.arange(target + 1) * source / target, np.arange(source)
        overlap = np.minimum(edge[1:, None], inner + 1) - np.maximum(edge[:-1, None], inner)
        return np.clip(overlap, 0, None) * target / source

    return overlaps(shape[0], mask.shape[0]) @ mask @ overlaps(shape[1], mask.shape[1]).T


@pytest.mark.parametrize("layout", ["jsrt", "montgomery", "shenzhen"])
def test_stored_masks_equal_the_files_masks(layout, prepared):
    """Compares with files read by Pillow and reduced by exact area means; only means within rounding of 1/2 may differ."""
    data, cache, store, _ = prepared[layout]
    for image_id, rows in data.masks.groupby("image_id"):
        shape = cache.read(image_id).pixels.shape
        files = [np.asarray(Image.open(path).convert("L")) > 127 for path in rows.path]
        expected = np.any([area_mean(mask, shape) >= 0.5 for mask in files], axis=0)
        assert dice(store.read(image_id) > 0, expected) > 0.999


def test_darwins_polygons_reproduce_the_drawing(prepared, written):
    """Compares with the same polygons filled by Pillow at four times the size and reduced."""
    data, cache, store, _ = prepared["darwin"]
    for image_id, path in zip(data.masks.image_id, data.masks.path, strict=True):
        record = json.loads(Path(path).read_text())
        lungs = [annotation for annotation in record["annotations"] if annotation["name"] == "Lung"]
        assert len(lungs) == 2
        size = (record["image"]["width"], record["image"]["height"])
        large = Image.new("1", (4 * size[0], 4 * size[1]))
        for lung in lungs:
            paths = [lung["polygon"]["path"]] if "polygon" in lung else lung["complex_polygon"]["path"]
            # The other paths cut small holes, which are ignored.
            outline = max(paths, key=len)
            ImageDraw.Draw(large).polygon([(4 * point["x"], 4 * point["y"]) for point in outline], fill=1)
        shape = cache.read(image_id).pixels.shape
        expected = np.asarray(large.convert("L").resize(shape[::-1], Image.Resampling.BOX)) > 127
        assert dice(store.read(image_id) > 0, expected) > 0.99
        assert read_mask(path).shape == size[::-1]


def test_darwins_lungs_include_the_heart(prepared):
    """Lungs alone leave a gap in every row; with the heart, the rows at its height have none."""
    gapless = {}
    for layout in ("shenzhen", "darwin"):
        _, _, store, _ = prepared[layout]
        shares = []
        for image_id in store.ids:
            rows = [np.flatnonzero(row) for row in store.read(image_id) > 0]
            shares.append(np.mean([len(row) == row[-1] - row[0] + 1 for row in rows if len(row)]))
        gapless[layout] = np.mean(shares)
    assert gapless["shenzhen"] < 0.2 and gapless["darwin"] > 0.3


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


@pytest.mark.parametrize("layout", ["montgomery", "darwin"])
def test_the_same_parameters_give_the_same_bytes_and_are_left_alone(layout, written, tmp_path):
    again = write_lungs(tmp_path, layout, **SIZES[layout], seed=3, workers=2, progress=False)
    assert digest(again) == digest(written[layout])
    canary = again / "canary"
    canary.write_text("")
    write_lungs(tmp_path, layout, **SIZES[layout], seed=3, progress=False)
    assert canary.exists()
    write_lungs(tmp_path, layout, images=4, side=320, seed=4, progress=False)
    assert not canary.exists() and len(read_dataset(layout, again, progress=False).images) == 4 - (layout == "darwin")


def test_jsrts_files_are_raw_and_masks_are_in_scrs_folds(written):
    files = sorted((written["jsrt"] / "All247images").iterdir())
    assert [path.stat().st_size for path in files] == [2 * 2048 * 2048] * 3
    assert decode_image(files[0]).pixels.shape == (2048, 2048)
    assert [path.name for path in files] == ["JPCLN001.IMG", "JPCLN002.IMG", "JPCNN003.IMG"]
    masks = sorted(str(path.relative_to(written["jsrt"])) for path in written["jsrt"].rglob("*.gif"))
    assert len(masks) == 9 and "scratch/fold1/masks/left lung/JPCLN001.gif" in masks
    assert {mask.split("/")[1] for mask in masks if "002" in mask} == {"fold2"}
    assert {Image.open(written["jsrt"] / mask).size for mask in masks} == {(1024, 1024)}  # SCR's
    # Big-endian, of 12 bits, of which the phantom uses the upper eight; black is high.
    values = np.fromfile(files[0], ">u2")
    assert values.max() <= 4095 and np.ptp(values) > 3000 and not (values % 16).any()


def test_shares_are_those_of_the_published_counts():
    for layout in LAYOUTS.values():
        assert sum(share for share, _ in layout.classes.values()) == pytest.approx(1)
    # Kermany's images (Cell 2018), and V7's count of COVID-19.
    assert list(DARWIN_COUNTS.values()) == [1583, 2780, 1493, 517]
    assert [round(share * 247) for share, _ in LAYOUTS["jsrt"].classes.values()] == [154, 93]
    assert [round(share * 138) for share, _ in LAYOUTS["montgomery"].classes.values()] == [80, 58]
    assert [round(share * 662) for share, _ in LAYOUTS["shenzhen"].classes.values()] == [326, 336]


def darwin_record(folder, number):
    """Write Darwin's files of one image with hand-made masks of 32 x 32 pixels; return its record."""
    masks = {name: np.zeros((32, 32), bool) for name in ("right_lung", "left_lung", "heart")}
    masks["right_lung"][8:24, 2:8] = masks["left_lung"][8:24, 24:30] = masks["heart"][12:20, 8:24] = True
    masks["left_lung"][10:12, 26:28] = False  # a hole
    drawn = SimpleNamespace(pixels=np.zeros((32, 32), np.uint8), masks=masks, sex="F", age=40)
    LAYOUTS["darwin"].write(folder, SimpleNamespace(number=number, shown="COVID-19"), drawn)
    return json.loads((folder / "annotations" / "all-images" / f"{965321 + number}.json").read_text())


def test_darwins_first_and_every_fiftieth_image_are_tagged_as_lateral_and_have_no_polygons(tmp_path):
    for number in (1, 2, 49, 50, 51, 99, 100):
        names = [annotation["name"] for annotation in darwin_record(tmp_path, number)["annotations"]]
        lateral = number in (1, 50, 100)
        assert names == ["COVID-19", "Viral Pneumonia", *(["Lateral"] if lateral else ["PA", "Lung", "Lung"])], number


def test_darwins_polygons_run_a_quarter_of_a_pixel_inside_and_share_the_heart(tmp_path):
    *_, right, left = darwin_record(tmp_path, 2)["annotations"]
    (outline, hole) = left["complex_polygon"]["path"]
    # The right lung's columns are 2 to 7 and the left one's 24 to 29; between them the heart is divided at column 15.5.
    for path, expected in (
        (right["polygon"]["path"], [2.25, 8.25, 15.75, 23.75]),
        (outline, [16.25, 8.25, 29.75, 23.75]),
    ):
        points = np.array([(point["x"], point["y"]) for point in path])
        assert [*points.min(axis=0), *points.max(axis=0)] == expected
    points = np.array([(point["x"], point["y"]) for point in hole])
    assert abs(points.mean(axis=0) - (27, 11)).max() < 0.3


def test_real_data_is_not_replaced_and_too_small_sizes_are_refused(tmp_path):
    (tmp_path / "shenzhen" / "CXR_png").mkdir(parents=True)
    (tmp_path / "shenzhen" / "CXR_png" / "CHNCXR_0001_0.png").write_bytes(b"real")
    with pytest.raises(FileExistsError, match="files that are not phantoms"):
        write_lungs(tmp_path, "shenzhen", **SIZES["shenzhen"], seed=3, progress=False)
    for layout, wrong, least in (
        ("jsrt", {"images": 1}, ">= 2 and .* = 1"),
        ("darwin", {"side": 319}, "side >= 320, .* = 319"),
    ):
        with pytest.raises(ValueError, match=least):
            write_lungs(tmp_path, layout, **(SIZES[layout] | wrong), seed=3)
    with pytest.raises(ValueError, match=r"'nih'; valid: jsrt, montgomery, shenzhen, darwin"):
        write_lungs(tmp_path, "nih", images=9, side=320, seed=3)
    assert list(LAYOUTS) == list(SIZES)

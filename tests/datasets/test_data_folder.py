"""Files of a data set in several folders: which one is used, which are copies, and which were never read."""

import re
from pathlib import Path

import pytest

from kitlib.datasets.data_folder import DataFolder
from kitlib.errors import DatasetError


@pytest.fixture
def write(tmp_path):
    def write(*names: str, content: bytes = b"") -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return write


def relative(path: Path | None, root: Path) -> str:
    return path.relative_to(root).as_posix() if path else ""


def test_files_are_in_the_order_of_folders_depths_and_names_and_each_is_listed_once(write):
    root = write("main/b/2.png", "main/b/1.png", "main/z.png", "main/a/deep/0.png", "beside/0.png")
    source = DataFolder(root / "main", [root / "main" / "b", root / "beside"])
    expected = ["main/z.png", "main/b/1.png", "main/b/2.png", "main/a/deep/0.png", "beside/0.png"]
    assert [relative(path, root) for path in source.paths] == expected
    assert [source.name(path) for path in source.paths] == ["z.png", "b/1.png", "b/2.png", "a/deep/0.png", "0.png"]
    assert DataFolder.of(source) is source and DataFolder.of(root / "main").paths == source.paths[:4]
    with pytest.raises(DatasetError, match="nowhere is not a folder"):
        DataFolder(root / "main", [root / "nowhere"])


def test_of_files_with_one_id_the_first_is_used_and_those_of_one_suffix_and_size_are_copies(write):
    write("a/x.png", "b/x.png", content=b"1")
    write("c/x.jpg", content=b"2")  # of the same size, but no copy
    write("d/x.png", "e/x.png", content=b"33")
    source = DataFolder(write("a/y.png", "a/notes.txt"))
    found = source.find_images()
    assert {name: source.name(path) for name, path in found.items()} == {"x": "a/x.png", "y": "a/y.png"}
    told = {row: problem for _, row, problem in source.faults.rows}
    assert told.keys() == {"b/x.png", "c/x.jpg"}
    assert "and 0 others are copies" in told["b/x.png"] and "and 2 others" in told["c/x.jpg"] and "differ" in told["c/x.jpg"]
    source.count_unread()
    assert len(source.faults.rows) == 2  # the files that are not used have been read


@pytest.mark.parametrize(
    ("tables", "patterns", "found"),
    [
        # File -> content; which of them is found.
        ({"t.csv": b"1", "sub/t.csv": b"2", "../beside/t.csv": b"3"}, ["t.csv"], "main/t.csv"),
        ({"sub/t.csv": b"2", "../beside/t.csv": b"3"}, ["t.csv"], "main/sub/t.csv"),
        ({"../beside/t.csv": b"3", "../beside/sub/t.csv": b"4"}, ["t.csv"], "beside/t.csv"),
        ({"b/t.csv": b"1", "a/t.csv": b"1"}, ["t.csv"], "main/a/t.csv"),
        ({"b/t.csv": b"1", "a/t.csv": b"2"}, ["t.csv"], None),
        ({"T.CSV": b"1"}, ["t.csv"], "main/T.CSV"),
        ({"t.csv": b"1", "sub/u.csv": b"2"}, ["u.csv", "t.csv"], "main/sub/u.csv"),
        ({"t_1.csv": b"1"}, ["u.csv", "t*.csv"], "main/t_1.csv"),
        ({"t.csv.bak": b"1"}, ["t.csv"], ""),
    ],
)
def test_a_table_is_the_nearest_of_its_name(write, tables, patterns, found):
    root = write("main/x.png", "beside/y.png")
    for name, content in tables.items():
        write(f"main/{name}", content=content)
    source = DataFolder(root / "main", [root / "beside"])
    if found is None:
        with pytest.raises(DatasetError, match=r"several files t\.csv that differ: a/t\.csv, b/t\.csv; give the folder"):
            source.find_table(*patterns)
    else:
        assert relative(source.find_table(*patterns), root) == found


def test_a_missing_table_is_an_error_that_lists_the_tables(write):
    source = DataFolder(write("main/x.png", "main/sub/a.csv", "main/b.JSON") / "main")
    message = r"t\.csv is missing, .*; the data set has the tables b\.JSON, sub/a\.csv\. To .*: get"
    with pytest.raises(DatasetError, match=message):
        source.need_table("t.csv", how_to_get="get it")
    with pytest.raises(DatasetError, match="the data set has 1 files, but no table"):
        DataFolder(write("bare/x.png") / "bare").need_table("t.csv", how_to_get="get it")


@pytest.mark.parametrize(
    ("cell", "found", "exactly"),
    [
        # The file for a cell, if its suffix may differ and if it must not.
        ("x.png", "x.png", "x.png"),
        (" X.PNG ", "x.png", "x.png"),
        ("x", "x.png", ""),
        ("x.dcm", "x.png", ""),
        ("1.2.9", "1.2.9.png", ""),
        ("1.2.9.jpg", "1.2.9.png", ""),
        ("1.2.8", "", ""),
        ("c.dcm", "c.dcm.png", ""),
        ("both.png", "both.png", "both.png"),
        ("both.jpg", "both.jpg", "both.jpg"),
        ("/home/me/sub/x.png", "sub/x.png", "sub/x.png"),
        ("D:\\sub\\x.png", "sub/x.png", "sub/x.png"),
        ("other/x.png", "x.png", "x.png"),
        ("notes.txt", "", ""),
        ("", "", ""),
    ],
)
def test_a_cell_of_a_table_names_a_file(write, cell, found, exactly):
    root = write("x.png", "sub/x.png", "1.2.9.png", "both.png", "both.jpg", "c.dcm.png", "notes.txt")
    source = DataFolder(root)
    assert relative(source.find_listed(cell, root), root) == found
    assert relative(source.find_listed(cell, root, exactly=True), root) == exactly
    source.count_unread()
    (fault,) = source.faults.rows
    assert f"and {6 - bool(found) - 1} other image files" in fault[2]


def test_the_files_of_a_table_are_looked_for_beside_it_and_then_in_the_data_sets_folder(write):
    root = write("main/train/x.png", "tables/train/x.png", "main/train/y.png", "main/z.png")
    source = DataFolder(root / "main", [root / "tables"])
    for cell, found in (("x.png", "tables/train/x.png"), ("y.png", "main/train/y.png"), ("z.png", "")):
        assert relative(source.find_listed(cell, root / "tables", "train"), root) == found


def test_no_file_is_given_to_two_cells_unless_both_name_it(write):
    root = write("a.png", "b.png")
    source = DataFolder(root)
    # c.jpg and c.png have no file. Of the first two, only one can be a.png; b.jpg and b.gif might both be b.png.
    cells = ["a.jpg", "a.png", "b.jpg", "b.gif", "c.jpg", "c.png"]
    found = [relative(path, root) for path in source.find_all_listed(cells, [root] * len(cells))]
    assert found == ["", "a.png", "b.png", "", "", ""]
    assert source.find_all_listed(["a.png", "A.PNG"], [root] * 2) == [root / "a.png"] * 2


def test_of_two_files_whose_names_differ_in_case_the_first_is_listed(write):
    root = write("X.png", "x.png")
    if len(list(root.iterdir())) == 2:
        assert DataFolder(root).find_listed("x.PNG", root) == root / "X.png"


def test_image_files_that_were_never_read_are_counted_by_folder(write):
    for count in range(1, 8):
        root = write(*(f"main/f{count}/{number}.png" for number in range(count)))
    write("main/f7/notes.txt", "main/f7/0.JPG", "beside/f8/0.png")
    source = DataFolder(root / "main", [root / "beside"])
    assert source.find([".jpg"]) == [root / "main" / "f7" / "0.JPG"]
    source.mark_read([str(root / "main" / "f2" / "0.png")])
    source.count_unread()
    ((_, row, problem),) = source.faults.rows
    assert row == "f1/0.png" and "and 26 other image files" in problem  # 1 + 2 + ... + 7 = 28, one of which was read
    # The five largest; f1 and f2 have one file each.
    assert re.findall(r"(f\d) (\d+)", problem) == [("f7", "7"), ("f6", "6"), ("f5", "5"), ("f4", "4"), ("f3", "3")]
    assert "2 more folders" in problem
    few = DataFolder(write(*(f"few/f{number}/0.png" for number in range(5))) / "few")
    few.count_unread()
    assert few.faults.rows[0][2].endswith("by folder: f0 1, f1 1, f2 1, f3 1, f4 1")
    more = DataFolder(write("few/f5/0.png") / "few")
    more.count_unread()
    assert more.faults.rows[0][2].endswith("f4 1 and 1 more folders")


def test_the_images_of_the_main_folder_are_counted_without_masks_and_those_set_aside(write):
    root = write("main/a.png", "main/b/c.DCM", "main/d.txt", "main/Masks/left/a.png", "main/mask.png", "beside/e.png")
    source = DataFolder(root / "main", [root / "beside"])
    assert source.count_images() == 3  # mask.png lies in no folder of masks
    source.set_aside([root / "main" / "a.png", root / "main" / "d.txt"])
    assert source.count_images() == 2

"""All folders are listed once, whatever links lead to them, and each one that is left out is told."""

from pathlib import Path

import pytest

from kitlib.datasets.walk import walk

FILES = ("data/b.png", "data/a.png", "data/A/x.png", "data/A/deep/y.png", "data/A/deep/er/z.png", "elsewhere/c/d.png")
IGNORED = ("data/.hidden/1.png", "data/A/.2.png", "data/__MACOSX/3.png", "data/A/Thumbs.db", "data/Desktop.ini")
LINKS = {"data/one": "elsewhere", "data/two": "elsewhere", "data/to_A": "data/A", "elsewhere/c/around": "elsewhere"}
UPWARDS = {"data/A/up": "data", "data/A/top": "."}  # to folders that contain `data`


@pytest.fixture
def tree(tmp_path):
    for name in (*FILES, *IGNORED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name, target in (LINKS | UPWARDS).items():
        (tmp_path / name).symlink_to(tmp_path / target)
    return tmp_path / "data"


def listed(root: Path, max_depth: int | None = None) -> tuple[list[tuple[str, list[str]]], dict[str, str]]:
    """Return what `walk` yields, with folders relative to `root`, and the folders that it leaves out, with the reasons."""
    left_out: dict[str, str] = {}
    found = list(walk(root, lambda folder, reason: left_out.update({folder: reason}), max_depth))
    return [(folder.relative_to(root).as_posix(), names) for folder, names in found], {
        Path(folder).relative_to(root).as_posix(): reason for folder, reason in left_out.items()
    }


def test_links_are_followed_once_and_after_all_other_folders(tree):
    found, left_out = listed(tree)
    assert found == [
        (".", ["a.png", "b.png"]),
        ("A", ["x.png"]),
        ("A/deep", ["y.png"]),
        ("A/deep/er", ["z.png"]),
        ("one", []),
        ("one/c", ["d.png"]),
    ]
    assert set(left_out) == {"two", "to_A", "one/c/around"} and all("link" in reason for reason in left_out.values())


@pytest.mark.parametrize(
    ("max_depth", "folders", "too_deep"),
    [
        (0, [], {"A", "one", "two", "to_A"}),
        (1, ["A", "one"], {"A/deep", "one/c"}),
        (2, ["A", "A/deep", "one", "one/c"], {"A/deep/er"}),
        (3, ["A", "A/deep", "A/deep/er", "one", "one/c"], set()),
    ],
)
def test_of_folders_that_are_too_deep_the_uppermost_is_told(tree, max_depth, folders, too_deep):
    found, left_out = listed(tree, max_depth)
    assert [folder for folder, _ in found] == [".", *folders]
    assert {folder for folder, reason in left_out.items() if f"over {max_depth} folders" in reason} == too_deep


def test_a_folder_that_cannot_be_read_is_told(tree):
    told = []
    for folder, _ in walk(tree / "A" / "deep", lambda *arguments: told.append(arguments)):
        if folder == tree / "A" / "deep":
            (folder / "er" / "z.png").unlink()
            (folder / "er").rmdir()
    ((folder, reason),) = told
    assert folder == str(tree / "A" / "deep" / "er") and "cannot be read" in reason


def test_a_folder_that_does_not_exist_has_no_files(tmp_path):
    assert list(walk(tmp_path / "none")) == []

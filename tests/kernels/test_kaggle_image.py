import shutil

import pytest
from typer.testing import CliRunner

from kitlib import __main__ as command_line
from kitlib.errors import KernelError
from kitlib.kernels import kaggle_image
from kitlib.kernels.kaggle_image import IMAGE_LIST, list_changes, refresh_image
from kitlib.kernels.wheels import read_pins


@pytest.fixture
def image_list(tmp_path):
    return shutil.copyfile(IMAGE_LIST, tmp_path / "kaggle_image.txt")


def frozen(tmp_path, *changes, more=""):
    """Write a `pip freeze` of the present image with some of its lines changed."""
    text = IMAGE_LIST.read_text().replace("certifi>=", "certifi==")
    for before, after in changes:
        assert f"\n{before}\n" in text
        text = text.replace(f"\n{before}\n", f"\n{after}\n" if after else "\n")
    path = tmp_path / "freeze.txt"
    path.write_text(text + more)
    return path


def test_the_present_list_changes_nothing_but_its_heading(tmp_path, image_list):
    assert refresh_image(frozen(tmp_path), image_list) == []
    lines = [[line for line in path.read_text().splitlines() if line[0] != "#"] for path in (image_list, IMAGE_LIST)]
    assert lines[0] == lines[1]  # also certifi>=, which is not tied to the image


def test_differences_are_returned_and_the_new_versions_written(tmp_path, image_list):
    wheel = "pandas @ file:///tmp/b/pandas-3.0.1-cp312-cp312-manylinux_2_24_x86_64.whl#sha256=ab"
    quoted = "torchvision @ https://download.pytorch.org/whl/cu128/torchvision-0.26.0%2Bcu128-cp312-cp312-linux_x86_64.whl"
    changes = [
        ("torch==2.10.0", "torch==2.11.0+cu128"),
        ("torchvision==0.25.0", quoted),
        ("pandas==2.3.3", wheel),
        ("absl-py==1.4.0", ""),
    ]
    assert list(map(str, refresh_image(frozen(tmp_path, *changes, more="New_One==1\n"), image_list))) == [
        "removed absl-py 1.4.0",
        "added new-one 1",
        "changed pandas 2.3.3 -> 3.0.1",
        "changed torch 2.10.0 -> 2.11.0",
        "changed torchvision 0.25.0 -> 0.26.0",
    ]
    pins = read_pins(image_list)
    assert [pins["torch"], pins["pandas"], pins["new-one"], "absl-py" in pins] == ["2.11.0", "3.0.1", "1", False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-e git+https://example.org/x#egg=x", "lines without a version: -e git"),
        ("mypackage @ file:///tmp/mypackage", "lines without a version: mypackage @ file"),
        ("Package    Version", "pip list --format=freeze"),
        ("torch==main", "lines without a version: torch==main"),
    ],
)
def test_a_line_without_a_version_is_an_error(tmp_path, image_list, line, message):
    before = image_list.read_text()
    with pytest.raises(KernelError, match=message):
        refresh_image(frozen(tmp_path, more=f"{line}\n"), image_list)
    assert image_list.read_text() == before


def test_a_list_of_another_machine_is_refused(tmp_path, image_list):
    (tmp_path / "own.txt").write_text("torch==2.10.0\npandas==2.3.3\n")
    with pytest.raises(KernelError, match=r"has 2 packages, but only 2 of the \d+ packages in .*pip list --format=freeze >"):
        refresh_image(tmp_path / "own.txt", image_list)


def test_a_list_may_lack_half_of_the_packages(tmp_path):
    image_list, frozen_list = tmp_path / "kaggle_image.txt", tmp_path / "freeze.txt"
    image_list.write_text("a==1\nb==1\nc==1\nd==1\n")
    frozen_list.write_text("a==1\ne==1\n")
    with pytest.raises(KernelError, match="has 2 packages, but only 1 of the 4 packages"):
        refresh_image(frozen_list, image_list)
    frozen_list.write_text("a==1\nb==1\n")
    assert list(map(str, refresh_image(frozen_list, image_list))) == ["removed c 1", "removed d 1"]


def test_a_file_that_is_no_text_is_refused(tmp_path, image_list):
    (tmp_path / "own.whl").write_bytes(b"a==1\nb==1\n\xff\n")
    with pytest.raises(KernelError, match="lines without a version"):
        refresh_image(tmp_path / "own.whl", image_list)


def test_of_many_lines_without_a_version_five_are_quoted(tmp_path, image_list):
    for count, end in ((5, r"line0; .*line4\. Save"), (7, r"line0; .*line4 and 2 more\. Save")):
        with pytest.raises(KernelError, match=f"lines without a version: {end}"):
            refresh_image(frozen(tmp_path, more="".join(f"line{number}\n" for number in range(count))), image_list)


def test_what_requirements_have_to_change(tmp_path):
    (tmp_path / "requirements.txt").write_text("a==1\nb==1  # *\nc==1\nd==1  # *\ne==1\n# f==1 # *\n")
    changes = list_changes(tmp_path / "requirements.txt", {"a": "1", "c": "2", "d": "3"})
    assert [change.split(" and ")[0].split("; ")[0] for change in changes] == [
        "c: write c==2 instead of 1",
        "d: Kaggle's Docker image now has this package",
        "e: Kaggle's Docker image no longer has this package",
    ]


def test_the_shipped_requirements_agree_with_the_image():
    assert list_changes() == []


def test_the_command_prints_the_differences(tmp_path, image_list, monkeypatch):
    monkeypatch.setattr(kaggle_image.refresh_image, "__defaults__", (image_list,))
    result = CliRunner().invoke(
        command_line.app, ["kaggle-image", str(frozen(tmp_path, ("torch==2.10.0", "torch==2.11.0")))]
    )
    assert result.exit_code == 0 and "changed torch 2.10.0 -> 2.11.0" in result.output
    assert read_pins(image_list)["torch"] == "2.11.0"

import importlib.metadata
import itertools
import re
import subprocess
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.errors import KernelError
from kitlib.kernels import wheels
from kitlib.kernels.wheels import are_installable, check_wheels, inference_pins, kaggle_wheels, local_wheels
from tests.small_kernels import make_wheel

# A made-up image for these tests.
IMAGE = {"numpy": "2.4.6", "pandas": "2.3.3"}


def test_the_pins_are_those_of_requirements_txt(tmp_path):
    lines = [f"{name}==1.{n}  # *" for n, name in enumerate(wheels.INFERENCE)]
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("-c constraints==0.txt\nnumpy==2.4.6\n# pebble==9\n" + "\n".join(lines))
    assert inference_pins(requirements) == {name: f"1.{n}" for n, name in enumerate(wheels.INFERENCE)}


def test_an_unpinned_package_is_named(tmp_path):
    (tmp_path / "requirements.txt").write_text("ultralytics==8.4.190\n")
    with pytest.raises(KernelError, match="does not pin ultralytics-thop; add `ultralytics-thop==VERSION`"):
        inference_pins(tmp_path / "requirements.txt")


def test_a_package_that_the_image_has_is_refused(monkeypatch):
    monkeypatch.setattr(wheels, "INFERENCE", ("torch",))
    with pytest.raises(KernelError, match=r"image has torch 2\.10\.0; remove torch from "):
        inference_pins()


def test_the_installed_packages_suit_the_image(tmp_path):
    """The pinned versions with their real requirements, from the installed metadata."""
    files = []
    for name, version in inference_pins().items():
        distribution = importlib.metadata.distribution(name)
        assert distribution.version == version
        files.append(make_wheel(tmp_path, name.replace("-", "_"), version, requires=distribution.requires or []))
    check_wheels(files, wheels.image_pins())


def test_requirements_may_be_met_by_the_image_or_by_another_wheel(tmp_path):
    # The last one is followed by a field of the metadata that no standard knows.
    one = make_wheel(tmp_path, "one", "1.0", ["numpy>=2.0", "Pandas (>=2,<3)", "The.Two==2.5\nUnknown-Field: x"])
    check_wheels([one, make_wheel(tmp_path, "the_two", "2.5")], IMAGE)
    # A wheel replaces the image's version; a pre-release in the image counts as a version.
    new = make_wheel(tmp_path, "new", "1.0", ["numpy>=3"])
    check_wheels([new, make_wheel(tmp_path, "numpy", "3.1")], IMAGE)
    check_wheels([one, make_wheel(tmp_path, "the_two", "2.5")], IMAGE | {"numpy": "2.5.0rc1"})
    with pytest.raises(KernelError, match=r"one requires numpy>=2\.0, but an attached wheel has numpy 1\.9"):
        check_wheels([one, make_wheel(tmp_path, "the_two", "2.5"), make_wheel(tmp_path, "numpy", "1.9")], IMAGE)


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("missing-one>=2", "one requires missing-one>=2, which neither the image nor another wheel has"),
        ("numpy<2", r"one requires numpy<2, but the image has numpy 2\.4\.6"),
        ("two>=3", r"one requires two>=3, but an attached wheel has two 2\.5"),
        ('numpy<2; python_version == "3.12" and sys_platform == "linux"', "one requires numpy<2"),
    ],
)
def test_an_unmet_requirement_is_an_error_naming_both(tmp_path, requirement, message):
    files = [make_wheel(tmp_path, "one", "1.0", [requirement]), make_wheel(tmp_path, "two", "2.5")]
    with pytest.raises(KernelError, match=message):
        check_wheels(files, IMAGE)


@pytest.mark.parametrize(
    "requirement",
    [
        "absent; extra == 'gpu'",
        "absent; sys_platform == 'win32'",
        "absent; python_version < '3.12'",
        "absent; os_name == 'nt'",
    ],
)
def test_requirements_for_other_platforms_are_ignored(tmp_path, requirement):
    check_wheels([make_wheel(tmp_path, "one", "1.0", [requirement])], IMAGE)


def test_an_unneeded_requirement_is_ignored_for_its_wheel_only(tmp_path):
    check_wheels([make_wheel(tmp_path, "ultralytics", "8.0", ["nvidia-ml-py>=12"])], IMAGE)
    with pytest.raises(KernelError, match="one requires nvidia-ml-py"):
        check_wheels([make_wheel(tmp_path, "one", "1.0", ["nvidia-ml-py>=12"])], IMAGE)


@settings(max_examples=40)
@given(version=st.tuples(*[st.integers(0, 20)] * 3), required=st.tuples(*[st.integers(0, 20)] * 3))
def test_versions_compare_as_numbers(tmp_path_factory, version, required):
    wheel = make_wheel(tmp_path_factory.mktemp("wheel"), "one", "1.0", ["numpy>={}.{}.{}".format(*required)])
    image = {"numpy": "{}.{}.{}".format(*version)}
    if version >= required:
        check_wheels([wheel], image)
    else:
        with pytest.raises(KernelError):
            check_wheels([wheel], image)


@pytest.mark.parametrize(
    ("tag", "fits"),
    [
        ("cp312-cp312-manylinux_2_28_x86_64", True),
        ("cp312-cp312-manylinux_2_35_x86_64", True),
        ("cp312-cp312-manylinux_2_5_x86_64", True),
        ("cp312-cp312-manylinux_2_31_x86_64.manylinux_2_36_x86_64", True),
        ("cp311-abi3-manylinux2014_x86_64", True),
        ("cp311-cp311-manylinux_2_28_x86_64", False),
        ("cp312-cp312-manylinux_2_36_x86_64", False),
        ("cp312-cp312-manylinux_2_28_aarch64", False),
        ("cp312-cp312-musllinux_1_2_x86_64", False),
        ("cp312-cp312-win_amd64", False),
    ],
)
def test_only_wheels_for_the_images_python_and_system(tmp_path, tag, fits):
    wheel = make_wheel(tmp_path, "one", "1.0", tag=tag)
    if fits:
        check_wheels([wheel], IMAGE)
    else:
        with pytest.raises(KernelError, match=r"is not built for Python 3\.12"):
            check_wheels([wheel], IMAGE)


def test_a_wheel_for_another_python_version_is_refused(tmp_path):
    check_wheels([make_wheel(tmp_path, "one", "1.0", python=">=3.12,<3.13")], IMAGE)
    with pytest.raises(KernelError, match=r"requires Python <3\.12"):
        check_wheels([make_wheel(tmp_path, "one", "1.0", python="<3.12")], IMAGE)


def test_all_faults_of_all_wheels_are_listed(tmp_path):
    files = [make_wheel(tmp_path, name, "1.0", ["absent-a", "absent-b"], python="<3") for name in ("two", "one")]
    files.append(make_wheel(tmp_path, "three", "1.0", tag="cp27-none-any"))
    with pytest.raises(KernelError) as raised:
        check_wheels(files, IMAGE)
    named = [re.match(r"  ([a-z]+)", line)[1] for line in str(raised.value).splitlines()[1:]]
    assert named == [*["one"] * 3, "three", *["two"] * 3]


def test_a_wheel_has_one_metadata_file(tmp_path):
    vendored = make_wheel(tmp_path, "one", "1.0", modules={"one/_vendor/two-2.dist-info/METADATA": "Requires-Dist: absent"})
    check_wheels([vendored], IMAGE)
    with pytest.raises(KernelError, match="has 2 METADATA files, expected one"):
        check_wheels([make_wheel(tmp_path, "one", "1.0", modules={"two-2.dist-info/METADATA": ""})], IMAGE)
    with zipfile.ZipFile(tmp_path / "two-1.0-py3-none-any.whl", "w") as empty:
        empty.writestr("two.py", "")
    with pytest.raises(KernelError, match="has 0 METADATA files, expected one"):
        check_wheels([tmp_path / "two-1.0-py3-none-any.whl"], IMAGE)


def test_source_distributions_are_refused(tmp_path):
    with pytest.raises(KernelError, match=r"grad-cam-1\.5\.5\.tar\.gz is not a wheel.*only \.whl"):
        check_wheels([tmp_path / "grad-cam-1.5.5.tar.gz"], IMAGE)


def test_this_python_can_install_pure_wheels_but_none_for_another_python(tmp_path):
    pure, other = make_wheel(tmp_path, "one", "1.0"), make_wheel(tmp_path, "two", "1.0", tag="cp27-cp27mu-manylinux1_x86_64")
    assert are_installable([pure])
    assert not are_installable([pure, other])


class FakePip:
    """Replaces `pip download`: writes wheels of chosen versions into its --dest."""

    def __init__(self, versions, tag="py3-none-any"):
        self.versions, self.tag, self.calls = versions, tag, []

    def __call__(self, command, **_):
        self.calls.append(command)
        for name, version in self.versions.items():
            make_wheel(command[command.index("--dest") + 1], name, version, tag=self.tag)
        return subprocess.CompletedProcess(command, 0, "", "")


def test_wheels_are_downloaded_once(tmp_path, monkeypatch):
    pip = FakePip({"one": "1.0", "the_two": "2.5"})
    monkeypatch.setattr(wheels.subprocess, "run", pip)
    pins = {"one": "1.0", "the-two": "2.5"}
    expected = [tmp_path / "one-1.0-py3-none-any.whl", tmp_path / "the_two-2.5-py3-none-any.whl"]
    assert kaggle_wheels(pins, tmp_path) == expected
    assert kaggle_wheels(pins, tmp_path) == expected
    assert len(pip.calls) == 1
    assert {"--no-deps", "--only-binary=:all:", "one==1.0", "the-two==2.5"} <= set(pip.calls[0])
    # pip chooses wheels for Kaggle's Python and system, not for those that it runs on.
    options = {("--python-version", "3.12"), ("--implementation", "cp"), ("--platform", "manylinux_2_28_x86_64")}
    options |= {("--abi", "cp312"), ("--abi", "abi3"), ("--abi", "none")}
    assert options <= set(itertools.pairwise(pip.calls[0]))


def test_only_missing_wheels_are_downloaded_and_other_versions_ignored(tmp_path, monkeypatch):
    make_wheel(tmp_path, "one", "1.0")
    make_wheel(tmp_path, "two", "1.9")
    pip = FakePip({"two": "2.5"})
    monkeypatch.setattr(wheels.subprocess, "run", pip)
    files = local_wheels({"one": "1.0", "two": "2.5"}, tmp_path)
    assert [path.name for path in files] == ["one-1.0-py3-none-any.whl", "two-2.5-py3-none-any.whl"]
    assert pip.calls[0][-1] == "two==2.5"
    assert not {"one==1.0", "--platform", "--python-version"} & set(pip.calls[0])


@pytest.mark.parametrize("fitting", ["cp312-cp312-manylinux_2_28_x86_64", "cp312-abi3-manylinux2014_x86_64", "py3-none-any"])
def test_of_two_wheels_of_one_version_the_one_for_kaggles_platform_is_taken(tmp_path, fitting):
    for tag in ("cp311-cp311-manylinux_2_28_x86_64", "cp312-cp312-win_amd64", fitting, "cp313-cp313-macosx_11_0_arm64"):
        make_wheel(tmp_path, "one", "1.0", tag=tag)
    assert [path.name for path in kaggle_wheels({"one": "1.0"}, tmp_path)] == [f"one-1.0-{fitting}.whl"]


def test_another_version_than_the_pin_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.subprocess, "run", FakePip({"one": "0.9"}))
    with pytest.raises(KernelError, match=r"no usable wheel of one==1\.0; wheels in .*: .*one-0\.9"):
        kaggle_wheels({"one": "1.0"}, tmp_path)


def test_pips_error_is_reported(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for one==1.0")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(KernelError, match=r"one==1\.0:\n.*No matching distribution"):
        kaggle_wheels({"one": "1.0"}, tmp_path)


def test_wheels_for_kaggle_and_for_this_python_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    monkeypatch.setattr(wheels.subprocess, "run", FakePip({"one": "1.0"}))
    (kaggle,), (local,) = kaggle_wheels({"one": "1.0"}), local_wheels({"one": "1.0"})
    assert kaggle.parent == tmp_path / "build" / "wheels"
    assert local.parent.parent == kaggle.parent.parent and local.parent != kaggle.parent

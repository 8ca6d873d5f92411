import importlib.metadata
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.errors import KernelError
from kitlib.kernels import wheels
from kitlib.kernels.wheels import check_wheels, inference_pins, kaggle_wheels, running_wheels, suits_running
from tests.small_kernels import make_wheel

# The imagined image of these tests.
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
    with pytest.raises(KernelError, match=r"image has torch 2\.10\.0; take it out"):
        inference_pins()


def test_what_is_installed_here_suits_the_image(tmp_path):
    """The pinned versions with their true requirements, as their installed metadata states them."""
    made = []
    for name, version in inference_pins().items():
        found = importlib.metadata.distribution(name)
        assert found.version == version
        made.append(make_wheel(tmp_path, name.replace("-", "_"), version, requires=found.requires or []))
    check_wheels(made, wheels.image_pins())


def test_requirements_may_be_met_by_the_image_or_by_another_wheel(tmp_path):
    one = make_wheel(tmp_path, "one", "1.0", ["numpy>=2.0", "Pandas (>=2,<3)", "The.Two==2.5"])
    check_wheels([one, make_wheel(tmp_path, "the_two", "2.5")], IMAGE)


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("missing-one>=2", "one wants missing-one>=2, which neither the image nor another wheel has"),
        ("numpy<2", r"one wants numpy<2, the image has numpy 2\.4\.6"),
        ("two>=3", r"one wants two>=3, an attached wheel has two 2\.5"),
        ('numpy<2; python_version == "3.12" and sys_platform == "linux"', "one wants numpy<2"),
    ],
)
def test_an_unmet_requirement_is_an_error_naming_both(tmp_path, requirement, message):
    made = [make_wheel(tmp_path, "one", "1.0", [requirement]), make_wheel(tmp_path, "two", "2.5")]
    with pytest.raises(KernelError, match=message):
        check_wheels(made, IMAGE)


@pytest.mark.parametrize(
    "requirement",
    [
        "absent; extra == 'gpu'",
        "absent; sys_platform == 'win32'",
        "absent; python_version < '3.12'",
        "absent; os_name == 'nt'",
    ],
)
def test_requirements_for_elsewhere_do_not_count(tmp_path, requirement):
    check_wheels([make_wheel(tmp_path, "one", "1.0", [requirement])], IMAGE)


def test_exceptions_hold_for_the_one_wheel_only(tmp_path):
    check_wheels([make_wheel(tmp_path, "ultralytics", "8.0", ["nvidia-ml-py>=12"])], IMAGE)
    with pytest.raises(KernelError, match="one wants nvidia-ml-py"):
        check_wheels([make_wheel(tmp_path, "one", "1.0", ["nvidia-ml-py>=12"])], IMAGE)


@settings(max_examples=40)
@given(have=st.tuples(*[st.integers(0, 20)] * 3), wanted=st.tuples(*[st.integers(0, 20)] * 3))
def test_versions_compare_as_numbers(tmp_path_factory, have, wanted):
    wheel = make_wheel(tmp_path_factory.mktemp("wheel"), "one", "1.0", ["numpy>={}.{}.{}".format(*wanted)])
    image = {"numpy": "{}.{}.{}".format(*have)}
    if have >= wanted:
        check_wheels([wheel], image)
    else:
        with pytest.raises(KernelError):
            check_wheels([wheel], image)


@pytest.mark.parametrize(
    ("tag", "fits"),
    [
        ("cp312-cp312-manylinux_2_28_x86_64", True),
        ("cp312-cp312-manylinux_2_31_x86_64.manylinux_2_35_x86_64", True),
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
        with pytest.raises(KernelError, match=r"is not for Python 3\.12"):
            check_wheels([wheel], IMAGE)


def test_a_wheel_for_another_python_version_is_refused(tmp_path):
    with pytest.raises(KernelError, match=r"wants Python <3\.12"):
        check_wheels([make_wheel(tmp_path, "one", "1.0", python="<3.12")], IMAGE)


def test_sources_are_refused(tmp_path):
    with pytest.raises(KernelError, match=r"grad-cam-1\.5\.5\.tar\.gz is no wheel.*only \.whl"):
        check_wheels([tmp_path / "grad-cam-1.5.5.tar.gz"], IMAGE)


def test_a_pure_wheel_suits_this_python_and_one_for_another_does_not(tmp_path):
    pure, other = make_wheel(tmp_path, "one", "1.0"), make_wheel(tmp_path, "two", "1.0", tag="cp27-cp27mu-manylinux1_x86_64")
    assert suits_running([pure])
    assert not suits_running([pure, other])


class FakePip:
    """Stands for `pip download`: puts wheels of chosen versions into its --dest."""

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
    assert {"--no-deps", "--only-binary=:all:", "one==1.0", "the-two==2.5", "manylinux_2_28_x86_64"} <= set(pip.calls[0])


def test_only_what_the_cache_lacks_is_downloaded_and_old_pins_stay_out(tmp_path, monkeypatch):
    make_wheel(tmp_path, "one", "1.0")
    make_wheel(tmp_path, "two", "1.9")
    pip = FakePip({"two": "2.5"})
    monkeypatch.setattr(wheels.subprocess, "run", pip)
    found = running_wheels({"one": "1.0", "two": "2.5"}, tmp_path)
    assert [path.name for path in found] == ["one-1.0-py3-none-any.whl", "two-2.5-py3-none-any.whl"]
    assert pip.calls[0][-1] == "two==2.5"
    assert "one==1.0" not in pip.calls[0]


def test_another_version_than_the_pin_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.subprocess, "run", FakePip({"one": "0.9"}))
    with pytest.raises(KernelError, match=r"other versions than the pins one==1\.0; in .*one-0\.9"):
        kaggle_wheels({"one": "1.0"}, tmp_path)


def test_pips_refusal_is_passed_on(tmp_path, monkeypatch):
    refused = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for one==1.0")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(KernelError, match=r"one==1\.0:\n.*No matching distribution"):
        kaggle_wheels({"one": "1.0"}, tmp_path)

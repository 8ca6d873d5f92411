"""Wheels of an attached dataset: those that are installed are skipped, and one that pip refuses is an error."""

import importlib.metadata

import pytest

from kitlib.errors import InputNotFound
from kitlib.inference.install_wheels import install_wheels


def test_installed_wheels_are_skipped_and_pip_says_what_is_wrong_with_others(tmp_path):
    (tmp_path / f"numpy-{importlib.metadata.version('numpy')}-py3-none-any.whl").write_bytes(b"never read")
    assert install_wheels(str(tmp_path)) == []
    (tmp_path / "no_such_package-1.0-py3-none-any.whl").write_bytes(b"no archive")
    # The second sentence is pip's, which it prints on stderr.
    with pytest.raises(RuntimeError, match=r"cannot install no_such_package==1.0 from (?s:.)*ERROR: .*no_such_package"):
        install_wheels(str(tmp_path))


def test_a_dataset_that_is_not_attached_is_named(tmp_path):
    with pytest.raises(InputNotFound, match="no-such-dataset"):
        install_wheels("no-such-dataset")

"""A local fake of Kaggle's server for the tests of pushing and submitting."""

import os
import sys

import pytest

from tests.small_kaggle import SmallKaggle


@pytest.fixture
def no_settings(monkeypatch, tmp_path):
    """Remove tokens, settings and the imported Kaggle client, which reads settings when it is imported."""
    for name in list(os.environ):
        if name.startswith("KAGGLE_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    (tmp_path / "home").mkdir()
    for name in [name for name in sys.modules if name.split(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def kaggle(no_settings, monkeypatch):
    small = SmallKaggle()
    # The client's own switch for a local server on port 80; the proxy sends these requests to the test's server.
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setenv("http_proxy", small.url)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "good")
    yield small
    small.close()

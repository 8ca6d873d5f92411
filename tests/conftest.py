"""Fixtures that several test files share."""

from pathlib import Path

import pytest
from hypothesis import settings

# Examples are timed by nobody: machines are shared, and a slow moment is no fault.
settings.register_profile("kit", deadline=None)
settings.load_profile("kit")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real X-rays that lie beside this project on its developers' machines."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder

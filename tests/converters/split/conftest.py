"""The small teacher, trained once a run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))


@pytest.fixture(scope="session")
def teacher():
    from small_teacher import teach

    return teach()

"""Runs the tests in the checkout's own `.venv`: python3 tests/run.py [--deep] [pytest arguments].

`--deep` adds the slow and the large tests. The first run makes the environment; until then, standard library only.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "samples"))

from environment import enter  # noqa: E402

if __name__ == "__main__":
    enter("test")
    import pytest

    os.chdir(ROOT)
    sys.exit(pytest.main(sys.argv[1:]))

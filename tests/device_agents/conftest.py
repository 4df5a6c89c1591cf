"""Lets every test in this folder say `from faults import Cable, Faults, Proxy`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

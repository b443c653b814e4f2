"""Makes `tests` importable however pytest is started: `pytest`, unlike `python -m pytest`, leaves the root out."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

pytest_plugins = ("tests.store_fixtures",)

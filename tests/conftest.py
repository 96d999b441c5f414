"""For all tests: what they start remembers what transformers makes of its own files (tests/quick_starts)."""

from __future__ import annotations

import os
from pathlib import Path

_folders = [str(Path(__file__).parent / "quick_starts"), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _folders))

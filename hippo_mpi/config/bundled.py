"""What comes with the package: models, their cards, a dashboard; in a wheel inside it, elsewhere in the checkout."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_PACKAGE = Path(str(files("hippo_mpi")))
BUNDLED = _PACKAGE / "bundled" if (_PACKAGE / "bundled").is_dir() else _PACKAGE.parent
BUNDLED_MODELS = BUNDLED / "models"
BUNDLED_NAMES = tuple(sorted(card.stem for card in BUNDLED_MODELS.glob("*.yaml")))
BUNDLED_MODEL = BUNDLED_MODELS / "story-3m"
DEFAULT_PROMPT = "Tell me a story about a fox."

"""What tests remember for the processes that they start is what transformers itself makes of its files."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, transformers.utils.import_utils as utils
models = os.path.join(os.path.dirname(os.path.dirname(utils.__file__)), "models", "__init__.py")
made = utils.spread_import_structure(utils.create_import_structure_from_path(models))
print(utils.define_import_structure.__module__, len(made) > 10, utils.define_import_structure(models) == made)
"""


def test_what_is_remembered_is_what_would_be_made() -> None:
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["remembered_imports", "True", "True"]

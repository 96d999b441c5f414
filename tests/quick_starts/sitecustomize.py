"""Python imports this at its start where PYTHONPATH leads here."""

import remembered_imports  # noqa: F401  (beside this file)

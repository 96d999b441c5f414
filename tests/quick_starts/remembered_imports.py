"""Remember what transformers makes of its own 3,300 files, which it reads twice at every import: 0.6 s of 1.6 of a start.

That table (which name is in which module) depends on nothing but these files, so tests of ranks lose nothing by it.
"""

from __future__ import annotations

import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # whatever is imported here costs every process some milliseconds
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_MODULE = "transformers.utils.import_utils"


class _Finder:
    """Stands before the other finders until that module is looked for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in sys.meta_path)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_patch(module: ModuleType) -> None:
                run(module)
                _remember_tables(module)

            spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


def _remember_tables(module: Any) -> None:
    make = module.define_import_structure

    def define(module_path: Any, prefix: str | None = None) -> Any:
        folder = os.fspath(module_path).removesuffix("/__init__.py")
        if os.path.basename(folder) != "models":  # the table of one model's few files
            return make(module_path, prefix)
        stamp = [os.stat(path).st_mtime_ns for path in (module.__file__, folder)]
        kept = os.path.join(folder, "__pycache__", f"hippo-{sys.implementation.cache_tag}-{prefix}.table")
        try:
            with open(kept, "rb") as file:
                made_of, table = marshal.load(file)
            if made_of == stamp:
                return table
        except (OSError, ValueError, EOFError, TypeError):
            pass
        table = make(module_path, prefix)
        _keep([stamp, table], kept)
        return table

    module.define_import_structure = define


def _keep(what: Any, path: str) -> None:
    try:
        with open(f"{path}.{os.getpid()}", "wb") as file:
            marshal.dump(what, file)
        os.replace(file.name, path)
    except OSError:  # an installation that isn't ours to write to, or that has no bytecode
        pass


sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]

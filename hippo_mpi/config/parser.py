"""Command lines, and what makes a dataclass of options out of one.

A field of such a class is an `option`: its default, its help, and how a value is checked. Its class says in GROUP under
which heading --help lists it. Several classes are put together by inheriting from them, the command's own first.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Generic, NoReturn, Protocol, TypeVar

from hippo_mpi.config import checks
from hippo_mpi.errors import UserError


class Options(Protocol):
    """A dataclass whose fields are options."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


_O = TypeVar("_O", bound=Options)
_OPTION = "option"  # in the metadata of a field


@dataclass(frozen=True)
class _Option:
    """What argparse must know of a field.

    Args:
        names: as they are typed; none: the field's own, with dashes.
        check: of what is typed; returns the value. None: it must be text.
        settings: more of argparse's, such as nargs and choices.
    """

    help: str
    names: tuple[str, ...]
    check: Callable[[str], Any] | None
    settings: dict[str, Any]


def option(default: Any, help: str, *names: str, check: Callable[[str], Any] | None = None, **settings: Any) -> Any:
    """Return a field of a class of options, as for `argparse.add_argument`; a bool is a switch.

    Names without dashes are arguments that are known by their place. Without names it is the field's own.
    """
    return dataclasses.field(default=default, metadata={_OPTION: _Option(help, names, check, settings)})


def with_default(options: type[Options], name: str, default: Any) -> Any:
    """Return a field like that of another class, but with another default."""
    return dataclasses.field(default=default, metadata=options.__dataclass_fields__[name].metadata)


def checks_of(options: type[Options]) -> dict[str, Callable[[str], Any]]:
    """Return how options are checked, by name; those that take any text are left out."""
    found = {field.name: field.metadata[_OPTION].check for field in dataclasses.fields(options)}
    return {name: check for name, check in found.items() if check is not None}


def changed(options: Options) -> dict[str, Any]:
    """Return those options that aren't at their defaults."""
    return {
        field.name: value
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) != field.default
    }


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something, as one types them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, ()):
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {','.join(map(str, action.default))})"
        return super()._get_help_string(action)


class _Version(argparse.Action):
    """Prints what a report of a mistake needs."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        versions = ", ".join(f"{name} {version(name)}" for name in ("hippo-mpi", "mlx", "mlx-lm"))
        print(f"{parser.prog}: {versions}, Python {platform.python_version()}")
        parser.exit()


class Once(argparse.Action):
    """Stores a value, and refuses a second one."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: object) -> None:
        """Store the value."""
        if getattr(namespace, self.dest, None) is not None:
            raise argparse.ArgumentError(self, "can be given only once")
        setattr(namespace, self.dest, value)


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that all ranks can agree on the error first."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        if self.add_help:
            self.add_argument("--version", action=_Version, help="print the versions of hippo-mpi and mlx-lm, and exit")

    def error(self, message: str) -> NoReturn:
        """Raise a UserError for what argparse has found."""
        raise UserError(f"{message} (--help lists the options)")


class OptionsParser(Parser, Generic[_O]):
    """Reads a command line into a dataclass of options.

    Args:
        options: the class.
        kwargs: argparse's own.
    """

    def __init__(self, options: type[_O], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = options
        groups: dict[str, argparse._ActionsContainer] = {"": self}
        for kind in options.__mro__:
            for field in (field for field in dataclasses.fields(options) if _owner(options, field.name) is kind):
                title = vars(kind).get("GROUP", "")
                if title not in groups:
                    groups[title] = self.add_argument_group(title)
                self._add(groups[title], field)

    def _add(self, group: argparse._ActionsContainer, field: dataclasses.Field[Any]) -> None:
        found: _Option = field.metadata[_OPTION]
        settings: dict[str, Any] = {"help": found.help, **found.settings}
        if self.argument_default is not argparse.SUPPRESS:
            settings["default"] = field.default
        if isinstance(field.default, bool):
            settings["action"] = "store_true"
        else:
            settings["type"] = found.check or checks.text
        own = f"--{field.name.replace('_', '-')}"
        names = (
            found.names if any(name.startswith("--") or name[0] != "-" for name in found.names) else (own, *found.names)
        )
        if names[0].startswith("-"):
            settings["dest"] = field.name
        elif "nargs" not in settings:
            settings.pop("default", None)  # it must be given
        group.add_argument(*names, **settings)

    def read(self, argv: Sequence[str] | None = None) -> _O:
        """Return the options of a command line; by default this process's.

        Raises:
            UserError: there is something that isn't one, or a value is wrong.
        """
        return self.options(**vars(self.parse_args(argv)))

    def read_known(self, argv: Sequence[str] | None = None) -> tuple[_O, list[str]]:
        """Return the options of a command line, and what is none of them.

        Raises:
            UserError: a value is wrong.
        """
        known, others = self.parse_known_args(argv)
        return self.options(**vars(known)), others


def read_given(options: type[Options], argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return those options that a command line gives, without any defaults, and what is none of them.

    Raises:
        UserError: a value is wrong.
    """
    parser = OptionsParser(options, add_help=False, argument_default=argparse.SUPPRESS)
    known, others = parser.parse_known_args(argv)
    return vars(known), others


def _owner(options: type, name: str) -> type:
    """Return the class that introduces a field, whichever others change its default."""
    return next(kind for kind in reversed(options.__mro__) if name in vars(kind).get("__annotations__", ()))

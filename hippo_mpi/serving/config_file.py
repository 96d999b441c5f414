"""A YAML file of options: what a command line says, written down. The command line wins over it."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from hippo_mpi.config import Parser
from hippo_mpi.errors import UserError


def file_options(path: Path, parser: Parser) -> list[str]:
    """The options of a file as command-line arguments. Keys are the long options' names, without their dashes.

    Raises:
        UserError: it can't be read, or a key is unknown, given twice, or has a value that its option doesn't take;
            the message names the line and the key.
    """
    try:
        root = yaml.compose(path.read_text(), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path} must hold keys and values, such as port: 8080")
    options, seen = [], set()
    known = {name[2:]: a for a in parser._actions for name in a.option_strings if name.startswith("--")}
    for key, value in root.value:
        name = str(key.value).replace("_", "-")
        where = f"{path}, line {key.start_mark.line + 1}"
        if name not in known or name in ("config", "help"):
            raise UserError(f"{where}: unknown key {key.value!r}")
        if name in seen:
            raise UserError(f"{where}: {key.value!r} is there twice")
        seen.add(name)
        own = _arguments(known[name], name, value, where)
        try:
            parser.parse_args(own)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        options += own
    return options


def _arguments(action: argparse.Action, name: str, value: yaml.Node, where: str) -> list[str]:
    """One key and its value as arguments."""
    if action.nargs == 0:  # a switch
        if not isinstance(value, yaml.ScalarNode) or value.tag != "tag:yaml.org,2002:bool":
            raise UserError(f"{where}: {name} must be true or false")
        return [f"--{name}"] if yaml.SafeLoader("").construct_yaml_bool(value) else []
    if isinstance(value, yaml.ScalarNode):
        return [f"--{name}={value.value}"] if action.nargs is None else [f"--{name}", value.value]
    if isinstance(value, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in value.value):
        items = [item.value for item in value.value]
        return [f"--{name}", *items] if action.nargs else [f"--{name}={','.join(items)}"]
    raise UserError(f"{where}: {name} must be a value, or a list of values")

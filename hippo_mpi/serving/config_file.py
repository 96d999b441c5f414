"""YAML files: one that drives a server, and cards of models. What a command line says, written down.

Keys are the long options' names, without their dashes. A server's file may also have

    hosts:                        # as in a hostfile
      - {ssh: 127.0.0.1, ips: [192.168.5.1]}
      - {ssh: mini2, ips: [192.168.5.2]}
    models:                       # the catalogue: a card each
      story: {model: models/story-3m, max-context: 1024}
      qwen: {model: mlx-community/Qwen3-4B-4bit, kv-bits: 8}
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hippo_mpi.config import Parser, add_access_options, add_batch_options, add_card_options, add_server_options
from hippo_mpi.errors import UserError

_MAX_TOKENS = 512  # of an answer, where nobody says more
_NEVER = ("config", "help", "version")


@dataclass(frozen=True)
class ConfigFile:
    """What a server's file says: options as command-line arguments, cards by name, and hosts."""

    options: list[str] = field(default_factory=list)
    cards: dict[str, list[str]] = field(default_factory=dict)
    hosts: list[Any] = field(default_factory=list)


def make_parser() -> Parser:
    """Of the command line of hippo_mpi.serve, and so of its file."""
    parser = Parser(
        prog="hippo_mpi.serve", description="An OpenAI API over ranks that are started again when they fail."
    )
    add_card_options(parser, _MAX_TOKENS)
    add_batch_options(parser)
    add_server_options(parser)
    add_access_options(parser)
    return parser


def card_parser() -> Parser:
    """Of what a model's card may say."""
    parser = Parser(add_help=False)
    add_card_options(parser, _MAX_TOKENS)
    return parser


def read_config(path: Path) -> ConfigFile:
    """Read a server's file.

    Raises:
        UserError: it can't be read, or a key is unknown, given twice, in contradiction to another, or has a value that
            its option doesn't take; the message names the line and the key.
    """
    found, lines = ConfigFile(), {}
    parser, of_cards = make_parser(), card_parser()
    for name, key, value, where in _entries(_load(path, "--config"), path):
        lines[name] = where
        if name == "models":
            for card, _, options, place in _entries(value, path):
                found.cards[card] = _all_options(options, path, of_cards)
                if not any(option.startswith("--model=") for option in found.cards[card]):
                    raise UserError(f"{place}: {card!r} needs the key 'model': a folder or a repo")
        elif name == "hosts":
            found.hosts.extend(_plain(value, where, key))
        else:
            found.options.extend(_options(name, key, value, where, parser))
    for other in ("hostfile", "ranks"):
        if "hosts" in lines and other in lines:
            raise UserError(f"{lines[other]}: {other!r} contradicts 'hosts' ({lines['hosts'].rpartition(', ')[2]})")
    return found


def read_card(path: Path) -> list[str]:
    """The options of a card file; relative paths of its models begin where the card lies.

    Raises:
        UserError: as for `read_config`, or the card names no model.
    """
    options = _all_options(_load(path, "the card"), path, card_parser())
    found = {name: value for name, _, value in (option.partition("=") for option in options)}
    if "--model" not in found:
        raise UserError(f"{path}: a card needs the key 'model': a folder or a repo")
    for name in {"--model", "--draft-model"} & set(found):
        beside = path.parent / found[name]
        options += [f"{name}={beside}"] if beside.exists() else []
    return options


def _load(path: Path, what: str) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None


def _entries(root: yaml.Node | None, path: Path) -> Iterator[tuple[str, str, yaml.Node, str]]:
    """(name of the option, key as written, value, where it stands) of a mapping."""
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}, line {root.start_mark.line + 1}: keys and values must stand here, as in port: 8080")
    seen = set()
    for key, value in root.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        name = str(key.value).replace("_", "-")
        if name in seen:
            raise UserError(f"{where}: {key.value!r} is there twice")
        seen.add(name)
        yield name, str(key.value), value, where


def _all_options(root: yaml.Node | None, path: Path, parser: Parser) -> list[str]:
    return [option for entry in _entries(root, path) for option in _options(*entry, parser)]


def _options(name: str, key: str, value: yaml.Node, where: str, parser: Parser) -> list[str]:
    """One key and its value as arguments that the parser takes."""
    known = {option[2:]: a for a in parser._actions for option in a.option_strings if option.startswith("--")}
    if name not in known or name in _NEVER:
        raise UserError(f"{where}: unknown key {key!r}")
    own = _arguments(known[name], name, value, where)
    try:
        parser.parse_args(own)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return own


def _arguments(action: argparse.Action, name: str, value: yaml.Node, where: str) -> list[str]:
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


def _plain(value: yaml.Node, where: str, key: str) -> list[Any]:
    """A list as Python's own objects."""
    found = yaml.SafeLoader("").construct_document(value)
    if not isinstance(found, list) or not found:
        raise UserError(f"{where}: {key} must be a list")
    return found

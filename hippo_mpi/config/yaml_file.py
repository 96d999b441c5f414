"""YAML files: one that drives every command, and cards of models. What a command line says, written down.

Keys are the long options' names, without their dashes. A file may also have

    hosts:                        # as in a hostfile
      - {ssh: 127.0.0.1, ips: [192.168.5.1]}
      - {ssh: mini2, ips: [192.168.5.2]}
    models:                       # the catalogue: a card each
      story: {model: models/story-3m, max-context: 1024}
      qwen: {model: mlx-community/Qwen3-4B-4bit, kv-bits: 8}

A command takes what it has an option for; what only hippo_mpi.serve has is left to that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from hippo_mpi.config.parser import Options, OptionsParser, Parser
from hippo_mpi.config.serve_options import CardOptions, ServeOptions
from hippo_mpi.errors import UserError

_NEVER = ("config", "help", "version")
_HOST_KEYS = ("ssh", "ips", "rdma", "python")

Settings = dict[str, list[str]]
"""By name of an option, the words that a command line would have for it."""


@dataclass(frozen=True)
class ConfigFile:
    """What a file says: options, cards by name, and hosts."""

    settings: Settings = field(default_factory=dict)
    cards: dict[str, Settings] = field(default_factory=dict)
    hosts: list[Any] = field(default_factory=list)
    path: Path | None = None


def words_of(settings: Mapping[str, list[str]], options: type[Options]) -> list[str]:
    """Return the words of a command line with those settings for which a command has options."""
    known = _actions(OptionsParser(options, add_help=False))
    return [word for name, words in settings.items() if name in known for word in words]


def read_config(path: Path, options: type[Options] = ServeOptions) -> ConfigFile:
    """Read a file for the command with these options.

    Raises:
        UserError: it can't be read, or a key is unknown, given twice, in contradiction to another, or has a value that
            its option doesn't take; the message names the line and the key.
    """
    file, lines = ConfigFile(path=path), dict[str, str]()
    known = _actions(OptionsParser(ServeOptions)) | _actions(OptionsParser(options))
    for name, key, value, where in _entries(_load(path, "--config"), path):
        lines[name] = where
        if name == "models":
            for card, _, settings, place in _entries(value, path):
                file.cards[card] = _settings(settings, path, _of_cards())
                if "model" not in file.cards[card]:
                    raise UserError(f"{place}: {card!r} needs the key 'model': a folder or a repo")
        elif name == "hosts":
            file.hosts.extend(_hosts(value, where, path))
        else:
            file.settings[name] = _words(name, key, value, where, known, ("hosts", "models"))
    for other in ("hostfile", "ranks"):
        if "hosts" in lines and other in lines:
            raise UserError(f"{lines[other]}: {other!r} contradicts 'hosts' ({lines['hosts'].rpartition(', ')[2]})")
    return file


def read_hosts(path: Path) -> list[Any]:
    """Return the hosts of a file; none if it has none.

    Raises:
        UserError: it can't be read, or they are no list of hosts.
    """
    entries = _entries(_load(path, "--config"), path)
    return next((_hosts(value, where, path) for name, _, value, where in entries if name == "hosts"), [])


def read_card(path: Path) -> Settings:
    """Return the settings of a card file; relative paths of its models begin where the card lies.

    Raises:
        UserError: as for `read_config`, or the card names no model.
    """
    card = _settings(_load(path, "the card"), path, _of_cards())
    if "model" not in card:
        raise UserError(f"{path}: a card needs the key 'model': a folder or a repo")
    for name in {"model", "draft-model"} & set(card):
        beside = path.parent / card[name][0].partition("=")[2]
        if beside.exists():
            card[name] = [f"--{name}={beside}"]
    return card


def read_catalogue(folder: Path) -> dict[str, Settings]:
    """Return the settings of every card file of a folder, by the files' names without .yaml.

    Raises:
        UserError: there is none, or one is wrong.
    """
    cards = {path.stem: read_card(path) for path in sorted(folder.glob("*.yaml"))}
    if not cards:
        raise UserError(f"--catalogue {folder} has no cards (files that end with .yaml)")
    return cards


def all_cards(file: ConfigFile, catalogue: Path | None) -> dict[str, Settings]:
    """Return the cards of a file and of a folder.

    Raises:
        UserError: both have one of the same name, or one is wrong.
    """
    cards = dict(file.cards)
    for name, card in (read_catalogue(catalogue) if catalogue else {}).items():
        if name in cards:
            raise UserError(f"the model {name!r} is both in --catalogue and in --config")
        cards[name] = card
    return cards


def take_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Return the file that a command line names with --config, and what else it says."""
    return _take(argv, "--config", Path)


def without_option(argv: list[str], name: str) -> list[str]:
    """Return a command line without an option and its value."""
    return _take(argv, name, str)[1]


def expanded(argv: list[str], options: type[Options]) -> list[str]:
    """Return a command line that says itself what its --config file says, and the card of the model that it names.

    The command line itself wins over the card, and that over the rest of the file. Without a model it is the first card's.

    Raises:
        UserError: the file or a card is wrong.
    """
    path, rest = take_config(argv)
    if path is None:
        return argv
    file = read_config(path, options)
    catalogue = file.settings.pop("catalogue", [""])[0].partition("=")[2]
    cards = all_cards(file, Path(catalogue) if catalogue else None)
    typed, others = _take(rest, "--model", str)
    name = typed or file.settings.get("model", [""])[0].partition("=")[2] or next(iter(cards), "")
    if name not in cards:
        return [*words_of(file.settings, options), *rest]
    return [*words_of(file.settings, options), *words_of(cards[name], options), *others]


def _take(argv: list[str], name: str, kind: Any) -> tuple[Any, list[str]]:
    finder = Parser(add_help=False)
    finder.add_argument(name, type=kind, dest="value")
    known, rest = finder.parse_known_args(argv)
    return known.value, rest


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


def _of_cards() -> dict[str, argparse.Action]:
    return _actions(OptionsParser(CardOptions, add_help=False))


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return a parser's options by their names without dashes."""
    return {name[2:]: a for a in parser._actions for name in a.option_strings if name.startswith("--")}


def _settings(root: yaml.Node | None, path: Path, known: Mapping[str, argparse.Action]) -> Settings:
    return {name: _words(name, key, value, where, known) for name, key, value, where in _entries(root, path)}


def _words(
    name: str,
    key: str,
    value: yaml.Node,
    where: str,
    known: Mapping[str, argparse.Action],
    sections: Iterable[str] = (),
) -> list[str]:
    """Return one key and its value as words of a command line, which its option takes."""
    if name not in known or name in _NEVER:
        raise _unknown(key, where, [*(known.keys() - {*_NEVER}), *sections])
    words = _arguments(known[name], name, value, where)
    checker = Parser(add_help=False)
    checker._add_action(known[name])
    try:
        checker.parse_args(words)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return words


def _unknown(key: str, where: str, known: Iterable[str]) -> UserError:
    nearest = get_close_matches(key.replace("_", "-"), sorted(known), 1)
    return UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))


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


def _hosts(value: yaml.Node, where: str, path: Path) -> list[Any]:
    """Return a list of hosts as Python's own objects; what they say is checked by whoever reads hostfiles."""
    for host in value.value if isinstance(value, yaml.SequenceNode) else ():
        for _, key, _, place in _entries(host, path) if isinstance(host, yaml.MappingNode) else ():
            if key not in _HOST_KEYS:
                raise _unknown(key, place, _HOST_KEYS)
    hosts = yaml.SafeLoader("").construct_document(value)
    if not isinstance(hosts, list) or not hosts:
        raise UserError(f"{where}: hosts must be a list")
    return hosts

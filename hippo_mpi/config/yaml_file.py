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
import os.path
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from hippo_mpi.config import checks
from hippo_mpi.config.bundled import BUNDLED_NAMES
from hippo_mpi.config.parser import Once, Options, OptionsParser, Parser, read_given
from hippo_mpi.config.serve_options import CardOptions, ServeOptions, StartOptions
from hippo_mpi.errors import UserError

_NEVER = ("config", "help", "version")
_START = ("hosts", "hostfile", "ranks", "backend")
_HOST_KEYS = ("ssh", "ips", "rdma", "python", "speed")
_HOST_LISTS = ("ips", "rdma")
_YAML = "tag:yaml.org,2002:"  # of what is no type of somebody's own

Settings = dict[str, list[str]]
"""By name of an option, the words that a command line would have for it."""


@dataclass(frozen=True)
class ConfigFile:
    """What a file says: options, cards by name, and hosts."""

    settings: Settings = field(default_factory=dict)
    cards: dict[str, Settings] = field(default_factory=dict)
    hosts: list[Any] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)  # where each key stands


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
    known = _actions(OptionsParser(ServeOptions)) | _actions(OptionsParser(options))
    return _read(_entries(_load(path, "--config"), path), path, known)


def read_start(path: Path) -> ConfigFile:
    """Read only what a file says about how ranks start: hosts, or a hostfile or a number of ranks, and the backend.

    Raises:
        UserError: as for `read_config`.
    """
    entries = (entry for entry in _entries(_load(path, "--config"), path) if entry[0] in _START)
    return _read(entries, path, _actions(OptionsParser(StartOptions)))


def read_card(path: Path) -> Settings:
    """Return the settings of a card file; relative paths of its models begin where the card lies.

    Raises:
        UserError: as for `read_config`, or the card names no model.
    """
    card = _settings(_load(path, "the card"), path, _of_cards())
    if "model" not in card:
        raise UserError(f"{path}: a card needs the key 'model': a folder or a repo")
    for name in {"model", "draft-model", "adapter-path"} & set(card):
        beside = path.parent / card[name][0].partition("=")[2]
        if os.path.exists(beside):  # names of repos may be too long for a file
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
    """Return the file that a command line names with --config, and what else it says.

    Raises:
        UserError: it names two.
    """
    return _take(argv, "--config", type=Path, action=Once)


def without_option(argv: list[str], name: str) -> list[str]:
    """Return a command line without an option and its value."""
    return _take(argv, name)[1]


def expanded(argv: list[str], options: type[Options]) -> list[str]:
    """Return a command line that says itself what its --config file says, and the card of the model that it names.

    The command line itself wins over the card, and that over the rest of the file. Without a model it is the first card's.

    Raises:
        UserError: the file or a card is wrong, or there is no model of that name.
    """
    path, rest = take_config(argv)
    if path is None:
        return argv
    file = read_config(path, options)
    catalogue = file.settings.pop("catalogue", [""])[0].partition("=")[2]
    cards = all_cards(file, Path(catalogue) if catalogue else None)
    typed, others = _take(rest, "--model")
    name = typed or file.settings.get("model", [""])[0].partition("=")[2] or next(iter(cards), "")
    if name in cards:
        return _in_front({**file.settings, **cards[name]}, others, options)
    if cards and "/" not in name and name not in BUNDLED_NAMES and not os.path.exists(os.path.expanduser(name)):
        raise UserError(
            f"no such model: {name}; {path} has {', '.join(cards)}; bundled models: {', '.join(BUNDLED_NAMES)}"
        )
    return _in_front(file.settings, rest, options)


def _in_front(settings: Settings, argv: list[str], options: type[Options]) -> list[str]:
    """Return a command line with those settings of a file that it leaves open."""
    known, (given, _) = _actions(OptionsParser(options, add_help=False)), read_given(options, argv)
    # An option that can be repeated would add to the file's.
    open_ones = {name: words for name, words in settings.items() if name in known and known[name].dest not in given}
    # Behind an option that takes a list, an argument that is known by its place would be one of the list.
    first = next((n for n, word in enumerate(argv) if word.startswith("-") and word != "-"), len(argv))
    return [*argv[:first], *words_of(open_ones, options), *argv[first:]]


def _take(argv: list[str], name: str, **settings: Any) -> tuple[Any, list[str]]:
    finder = Parser(add_help=False)
    finder.add_argument(name, dest="value", **settings)
    known, rest = finder.parse_known_args(argv)
    return known.value, rest


def _load(path: Path, what: str) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text("utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} can't be read: {error}") from None
    except RecursionError:
        raise UserError(f"{what} {path} is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # also numbers of characters that don't exist
        raise UserError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None


def _read(entries: Iterable[_Entry], path: Path, known: Mapping[str, argparse.Action]) -> ConfigFile:
    file = ConfigFile()
    for name, key, value, where in entries:
        file.lines[name] = where
        if name == "models":
            file.cards.update(_cards(value, where, path))
        elif name == "hosts":
            file.hosts.extend(_hosts(value, where, path))
        else:
            file.settings[name] = _words(name, key, value, where, known, ("hosts", "models"))
    for other in ("hostfile", "ranks"):
        if "hosts" in file.lines and other in file.lines:
            line = file.lines["hosts"].rpartition(", ")[2]
            raise UserError(f"{file.lines[other]}: {other!r} conflicts with 'hosts' ({line})")
    return file


def _cards(root: yaml.Node, where: str, path: Path) -> dict[str, Settings]:
    cards = {}
    for _, key, settings, place in _entries(root, path):
        cards[key] = _settings(settings, path, _of_cards())
        if "model" not in cards[key]:
            raise UserError(f"{place}: {key!r} needs the key 'model': a folder or a repo")
    if not cards:
        raise UserError(f"{where}: models is empty; expected cards, as in story: {{model: models/story-3m}}")
    return cards


_Entry = tuple[str, str, yaml.Node, str]


def _entries(root: yaml.Node | None, path: Path) -> Iterator[_Entry]:
    """(name of the option, key as written, value, where it stands) of a mapping."""
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}, line {root.start_mark.line + 1}: expected keys and values, as in port: 8080")
    seen = set()
    for key, value in root.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}: a key must be a name")
        text = _text(key, where)
        name = text.replace("_", "-")
        if name in seen:
            raise UserError(f"{where}: duplicate key {text!r}")
        seen.add(name)
        yield name, text, value, where


def _text(node: yaml.ScalarNode, where: str) -> str:
    """Return what stands at a place, as it is written.

    Raises:
        UserError: it can't be a word of a command line, or has a type of somebody's own.
    """
    text = str(node.value)
    if not node.tag.startswith(_YAML):
        raise UserError(f"{where}: unsupported YAML tag {node.tag!a}")
    try:
        checks.text(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where}: {error}") from None
    if "\0" in text:
        raise UserError(f"{where}: {text[:100]!a} contains a NUL character")
    return text


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
        is_on = yaml.SafeLoader.bool_values.get(value.value.lower()) if _is_bool(value) else None
        if is_on is None:
            raise UserError(f"{where}: {name} must be true or false")
        return [f"--{name}"] if is_on else []
    items: list[Any] = value.value if isinstance(value, yaml.SequenceNode) else [value]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise UserError(f"{where}: {name} must be a value, or a list of values")
    texts = [_text(item, where) for item in items]
    if action.nargs is None:
        is_list = isinstance(action, argparse._AppendAction)
        return [f"--{name}={text}" for text in (texts if is_list else [",".join(texts)])]
    if dashed := next((text for text in texts if re.match(r"-\S", text)), None):
        raise UserError(f"{where}: {dashed!r} looks like an option, and can't be a value of {name}")
    return [f"--{name}", *texts]


def _is_bool(value: yaml.Node) -> bool:
    return isinstance(value, yaml.ScalarNode) and value.tag == f"{_YAML}bool"


def _hosts(value: yaml.Node, where: str, path: Path) -> list[Any]:
    """Return a list of hosts as in a hostfile; what they say is checked by whoever reads those."""
    if not isinstance(value, yaml.SequenceNode) or not value.value:
        raise UserError(f"{where}: hosts must be a list, as in [{{ssh: mini2, ips: [192.168.5.2]}}]")
    return [dict(_host(host, path)) for host in value.value]


def _host(root: yaml.Node, path: Path) -> Iterator[tuple[str, Any]]:
    for _, key, value, where in _entries(root, path):
        if key not in _HOST_KEYS:
            raise _unknown(key, where, _HOST_KEYS)
        if isinstance(value, yaml.SequenceNode) != (key in _HOST_LISTS):
            raise UserError(f"{where}: {key} must be {'a list' if key in _HOST_LISTS else 'a single name'}")
        plain = _plain(value, where)
        yield key, _speed(plain, where) if key == "speed" else plain


def _speed(text: Any, where: str) -> float:
    try:
        return float(checks.above_0(str(text)))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where}: speed: {error}") from None


def _plain(value: yaml.Node, where: str, depth: int = 2) -> Any:
    """Return a text, None, or a list of such; and lists of these, as JACCL's devices are."""
    if isinstance(value, yaml.ScalarNode):
        return None if value.tag == f"{_YAML}null" else _text(value, where)
    if isinstance(value, yaml.SequenceNode) and depth:
        return [_plain(item, where, depth - 1) for item in value.value]
    raise UserError(f"{where}: expected a name, or a list of names")

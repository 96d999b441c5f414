"""Made-up text for the bundled models: short stories about animals, and simple questions.

Everything comes from the grammar in stories.yaml and a seed, so that the models' whole training text
can be made again, bit for bit, on any machine.
"""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path
from typing import Any

import yaml

Conversation = list[dict[str, str]]
"""Messages with "role" ("user" or "assistant") and "content", as a chat template takes them."""

HELD_OUT_PERCENT = 4
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

_grammar: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "stories.yaml").read_text())
_PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def _expand(template: str, cast: dict[str, str], rng: random.Random) -> str:
    """Fill every {symbol}: from the cast, else by a fresh choice from the grammar. {Symbol} is capitalised."""

    def fill(match: re.Match[str]) -> str:
        symbol = match[1]
        if symbol in cast:
            return cast[symbol]
        if symbol[0].isupper():
            return _capitalise(cast[symbol.lower()])
        return _expand(rng.choice(_grammar[symbol]), cast, rng)

    text = re.sub(r"\{(\w+)\}", fill, template)
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def _make_cast(rng: random.Random) -> dict[str, str]:
    hero, pal, other = rng.sample(_grammar["animals"], 3)
    name, friend = rng.sample(_grammar["names"], 2)
    traits = rng.sample(_grammar["traits"], 3)
    he, him, his = _PRONOUNS[rng.choice(["he", "she"])]
    he2, him2, his2 = _PRONOUNS[rng.choice(["he", "she"])]
    when = rng.choice(_grammar["when"])
    return {
        "hero": hero, "pal": pal, "other": other, "name": name, "friend": friend,
        "trait": traits[0], "trait2": traits[1], "trait3": traits[2],
        "he": he, "him": him, "his": his, "he2": he2, "him2": him2, "his2": his2,
        "when": when, "when_l": when[0].lower() + when[1:],
        "place": rng.choice(_grammar["places"]), "thing": rng.choice(_grammar["things"]),
        "skill": rng.choice(_grammar["skill"]),
    }  # fmt: skip


def _story(rng: random.Random) -> Conversation:
    cast = _make_cast(rng)
    beats = [_grammar["opening"], *rng.choice(list(_grammar["stories"].values()))]
    if rng.random() < 0.8:
        beats.append(_grammar["moral"])
    beats.append(_grammar["ending"])
    sentences = [_capitalise(_expand(rng.choice(beat), cast, rng)) for beat in beats]
    conversation = [
        {"role": "user", "content": _expand(rng.choice(_grammar["ask"]), cast, rng)},
        {"role": "assistant", "content": " ".join(sentences)},
    ]
    if rng.random() < 0.3:
        conversation += _follow_up(cast, rng)
    return conversation


def _follow_up(cast: dict[str, str], rng: random.Random) -> Conversation:
    question, answer = rng.choice(
        [
            ("What was the name of the {hero}?", "The {hero} was named {name}."),
            ("Who was {friend}?", "{friend} was a {pal}."),
            ("Who helped {name}?", "It was {friend} the {pal}."),
            ("Thank you!", "You are welcome!"),
        ]
    )
    return [
        {"role": "user", "content": _expand(question, cast, rng)},
        {"role": "assistant", "content": _expand(answer, cast, rng)},
    ]


def _sum(rng: random.Random) -> Conversation:
    a = rng.randrange(11)
    b = rng.randrange(11 - a)
    return [
        {"role": "user", "content": f"What is {NUMBERS[a]} plus {NUMBERS[b]}?"},
        {"role": "assistant", "content": f"{_capitalise(NUMBERS[a])} plus {NUMBERS[b]} is {NUMBERS[a + b]}."},
    ]


def _fact(rng: random.Random) -> Conversation:
    question, answer = rng.choice(_grammar["facts"]).split(" | ")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _is_held_out(conversation: Conversation) -> bool:
    digest = hashlib.sha256(conversation[-1]["content"].encode()).digest()
    return len(conversation[1]["content"]) > 200 and digest[0] % 100 < HELD_OUT_PERCENT


def conversations(count: int, seed: int, held_out: bool = False) -> list[Conversation]:
    """`count` conversations. Held-out ones are stories that no call without `held_out` ever returns."""
    rng = random.Random(seed)
    made: list[Conversation] = []
    while len(made) < count:
        kind = rng.random()
        conversation = _story(rng) if kind < 0.85 else _fact(rng) if kind < 0.93 else _sum(rng)
        if _is_held_out(conversation) == held_out:
            made.append(conversation)
    return made

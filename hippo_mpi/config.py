"""What can be asked of a command: option groups for argparse, and the frozen records they are read into.

Names and defaults are mlx_lm.generate's wherever it has the option. mlx.launch takes options out of its
program's own arguments, abbreviations too: none of ours may be a prefix of one of its own (a test checks).
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from hippo_mpi.errors import UserError

_PACKAGE = Path(str(files("hippo_mpi")))
BUNDLED = _PACKAGE / "bundled" if (_PACKAGE / "bundled").is_dir() else _PACKAGE.parent
"""Folder of what comes with the package: in a wheel inside it, elsewhere the checkout (pyproject.toml)."""
BUNDLED_MODELS = BUNDLED / "models"
BUNDLED_MODEL = BUNDLED_MODELS / "story-3m"
API_KEYS = "HIPPO_API_KEYS"
"""Environment variable with a server's keys, with commas between."""
PRECISIONS = ("float32", "float16", "bfloat16", "8bit", "6bit", "5bit", "4bit", "3bit", "2bit")
MODES = ("completion", "chat", "tools", "thinking")
BACKENDS = ("ring", "mpi", "jaccl", "jaccl-ring")
LOG_LEVELS = ("debug", "info", "warning", "error")
DEFAULT_PROMPT = "Tell me a story about a fox."


@dataclass(frozen=True)
class RunOptions:
    """How the ranks share the work; the same on every rank."""

    layer_split: tuple[int, ...] | None
    max_context: int | None
    num_draft_tokens: int = 0


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


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that all ranks can agree on the error first."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        if self.add_help:
            self.add_argument("--version", action=_Version, help="print the versions of this and of mlx-lm, and stop")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=str(BUNDLED_MODEL),
        help="folder or Hugging Face repo of an mlx-lm model, or a bundled one: story-3m, story-draft",
    )
    group.add_argument("--revision", help="revision of the Hugging Face repo")
    group.add_argument(
        "--precision", choices=PRECISIONS, help="cast or quantise the weights while loading; as stored if not given"
    )
    group.add_argument("--adapter-path", help="folder with trained adapter weights and their config")
    group.add_argument("--trust-remote-code", action="store_true", help="allow the checkpoint to bring its own code")


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speculative decoding")
    group.add_argument("--draft-model", help="folder or repo of a small model, whole on rank 0, that proposes tokens")
    group.add_argument("--num-draft-tokens", type=positive, default=3, help="most tokens that it proposes for a step")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument("--system-prompt", help="system prompt for the chat template")
    group.add_argument("--prefill-response", help="how the answer must begin")
    group.add_argument("--ignore-chat-template", action="store_true", help="use the prompt as it is")
    group.add_argument("--chat-template-config", help="JSON object of arguments for the chat template")
    group.add_argument("--extra-eos-token", nargs="+", default=(), help="further tokens that end an answer")


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", "-m", type=positive, default=max_tokens, help="longest answer")
    group.add_argument("--temp", type=at_least_0, default=0.0, help="temperature; 0 takes the likeliest token")
    group.add_argument("--top-p", type=share, default=1.0, help="nucleus sampling")
    group.add_argument(
        "--min-p", type=share, default=0.0, help="smallest probability relative to the likeliest token's"
    )
    group.add_argument("--top-k", type=whole, default=0, help="number of likeliest tokens to choose from; 0: all")
    group.add_argument("--min-tokens-to-keep", type=positive, default=1, help="tokens that min-p always keeps")
    group.add_argument("--xtc-probability", type=share, default=0.0, help="how often XTC sampling happens")
    group.add_argument("--xtc-threshold", type=half, default=0.1, help="threshold of XTC sampling")
    group.add_argument("--repetition-penalty", type=above_0, help="penalty for tokens that came before")
    group.add_argument("--repetition-context-size", type=positive, default=20, help="how many tokens count as before")
    group.add_argument(
        "--max-repeats",
        type=whole,
        default=0,
        help="end an answer that says the same so many times in a row; 0: let it",
    )
    group.add_argument("--seed", type=seed, help="seed of the random numbers")
    group.add_argument("--stop-words", nargs="+", default=(), help="texts that end an answer; not shown")


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("KV cache")
    group.add_argument("--max-kv-size", type=positive, help="keep this many tokens at most (rotating cache)")
    group.add_argument("--kv-bits", type=int, choices=(2, 3, 4, 6, 8), help="quantise the cache to this many bits")
    group.add_argument("--kv-group-size", type=int, choices=(32, 64, 128), default=64, help="group size of that")
    group.add_argument("--quantized-kv-start", type=whole, default=5000, help="quantise from this position on")


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests in flight")
    group.add_argument("--max-batch-size", type=positive, default=32, help="most requests that are answered at once")
    group.add_argument(
        "--max-batch-tokens",
        type=positive,
        default=512,
        help="most prompt tokens between two steps of running requests",
    )
    group.add_argument(
        "--prompt-cache-bytes",
        type=size,
        help="memory per rank for caches of ended requests, kept for prompts that begin alike, such as 512M or 2G;"
        " 0: none; by default a part of what is free",
    )


def add_deadlines(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--timeout", type=two_beats, default=30.0, help="seconds without progress after which all ranks end"
    )
    group.add_argument(
        "--start-timeout", type=above_0, default=30.0, help="seconds that ranks wait for each other to start"
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks")
    group.add_argument("--layer-split", type=counts, help="layers per rank, such as 14,10; planned if not given")
    group.add_argument(
        "--max-context", type=positive, help="longest prompt and answer together; the model's own, or what fits"
    )
    add_deadlines(group)
    group.add_argument(
        "--prefill-step-size",
        "--prefill-chunk",
        type=positive,
        help="prompt tokens per step; by default 2048 on a GPU and 256 on a CPU; smaller chunks on several ranks",
    )


def add_card_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """All that may be different for each model that a server has."""
    add_model_options(parser)
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=(), help="what the model may be asked for; by default all it can"
    )
    add_draft_options(parser)
    add_prompt_options(parser)
    add_sampling_options(parser, max_tokens)
    add_cache_options(parser)
    add_run_options(parser)


def add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--config", type=Path, help="YAML file of options, hosts and models; options of the command line win"
    )
    group.add_argument("--address", default="127.0.0.1", help="address to listen on")
    group.add_argument("--port", type=port, default=8080, help="port to listen on; 0: any free one")
    group.add_argument("--model-name", help="name of the model in the API; the last part of --model if not given")
    group.add_argument(
        "--catalogue",
        type=Path,
        help="folder of cards (NAME.yaml: the model's options); any may be asked for; --model NAME says which comes first",
    )
    group.add_argument("--max-queue", type=whole, default=256, help="requests that may wait; more get status 429")
    group.add_argument("--max-body-bytes", type=some_bytes, default=4 << 20, help="most bytes of a request, such as 4M")
    group.add_argument("--max-choices", type=positive, default=128, help="most answers that one request may ask for")
    group.add_argument(
        "--max-schema-bytes",
        type=size,
        default=128 << 10,
        help="most bytes of the schemas that an answer is held to; each may also take 5 seconds to compile",
    )
    group.add_argument("--audit-log", type=Path, help="write who asked for what, and how it ended, into this file")
    group.add_argument("--audit-text", action="store_true", help="prompts and answers, too, and not only digests")
    group.add_argument(
        "--journal",
        type=Path,
        help="keep what is asked and answered in this file, so that it outlives the server's death",
    )
    group.add_argument(
        "--keep-answers",
        type=at_least_0,
        default=86400.0,
        help="seconds for which the journal keeps answers that are to be stored",
    )
    group.add_argument(
        "--reconnect",
        type=at_least_0,
        default=0.0,
        help="seconds for which a stream goes on without its client, which may come back by its id; with --journal",
    )
    group.add_argument("--check", action="store_true", help="only say what is wrong with these options, if anything is")
    group.add_argument("--audit-key", type=Path, help="file with that file's key, made if missing; by default FILE.key")
    group.add_argument(
        "--audit-required", action="store_true", help="refuse requests (503) while they can't be written down"
    )
    group.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="least weight of the lines on stderr")
    group = parser.add_argument_group("ranks that this command starts itself")
    group.add_argument("--hostfile", type=Path, help="JSON list of hosts, as for mlx.launch")
    group.add_argument("--ranks", type=positive, default=2, help="ranks on this machine, without a hostfile")
    group.add_argument("--backend", choices=BACKENDS, default="ring", help="of mlx.launch, with a hostfile")
    group.add_argument(
        "--max-restarts",
        type=whole,
        default=5,
        help="failures in a row, without a token between, that a request bears",
    )


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Who may ask a server, and how much."""
    group = parser.add_argument_group("who may ask")
    group.add_argument(
        "--api-key-file", type=Path, help=f"file with a key a line; or keys in {API_KEYS}, with commas between"
    )
    group.add_argument(
        "--admin-key-file",
        type=Path,
        help="file with keys, a line each, that alone may change the model; by default all may",
    )
    group.add_argument("--insecure", action="store_true", help="listen on other addresses without an API key")
    group.add_argument("--ssl-certfile", type=Path, help="certificate of the server (PEM): encrypt, and serve https")
    group.add_argument("--ssl-keyfile", type=Path, help="its private key, if that is in another file")
    group.add_argument(
        "--allow-origin", nargs="+", type=origin, default=(), help="origins of web pages that may ask (CORS); *: all"
    )
    group.add_argument(
        "--allow-host",
        nargs="+",
        type=host_name,
        default=(),
        help="names that clients may call this server by, besides localhost",
    )
    group.add_argument(
        "--trusted-proxy",
        nargs="+",
        type=network,
        default=(),
        help="addresses of proxies whose X-Forwarded-For is believed",
    )
    group.add_argument("--requests-per-minute", type=whole, default=0, help="of each key (or address); 0: any number")
    group.add_argument(
        "--tokens-per-minute", type=whole, default=0, help="of prompts and answers of each key; 0: any number"
    )
    group.add_argument(
        "--requests-per-key",
        type=whole,
        help="under way or waiting at once; 0: any number; by default half of all, if there are several keys",
    )
    group.add_argument("--max-connections", type=positive, default=1000, help="at once; half of them of one address")
    group.add_argument(
        "--share-prefixes", action="store_true", help="let prompts begin with what was computed for other keys"
    )


def run_options(arguments: argparse.Namespace) -> RunOptions:
    return RunOptions(arguments.layer_split, arguments.max_context, getattr(arguments, "num_draft_tokens", 0))


# ---- checked values; argparse puts the message behind "argument --name:"


def _number(
    text: str, kind: type[float] | type[int], what: str, low: float, high: float = float("inf"), open_low: bool = False
) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
    if not low <= value <= high or (open_low and value == low):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value


def positive(text: str) -> int:
    return int(_number(text, int, "a whole number above 0", 1))


def whole(text: str) -> int:
    return int(_number(text, int, "a whole number", 0))


def port(text: str) -> int:
    return int(_number(text, int, "a port, from 0 to 65535", 0, 65535))


def network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an address such as 10.0.0.1, or a network 10.0.0.0/8"
        ) from None


def seed(text: str) -> int:
    return int(_number(text, int, "a seed, from 0 to 2**64 - 1", 0, 2**64 - 1))


def at_least_0(text: str) -> float:
    return float(_number(text, float, "a number of at least 0", 0.0))


def above_0(text: str) -> float:
    return float(_number(text, float, "a number above 0", 0.0, open_low=True))


def two_beats(text: str) -> float:
    return float(_number(text, float, "a number of seconds from 1 up: ranks say twice a second that they live", 1.0))


def share(text: str) -> float:
    return float(_number(text, float, "a number from 0 to 1", 0.0, 1.0))


def half(text: str) -> float:
    return float(_number(text, float, "a number from 0 to 0.5", 0.0, 0.5))


def size(text: str) -> int:
    """Bytes: a number, or one with K, M or G behind it, as for mlx_lm.server."""
    shift = {"K": 10, "M": 20, "G": 30}.get(text.upper().removesuffix("B")[-1:], 0)
    number = text.upper().removesuffix("B").rstrip("KMG") if shift else text
    return int(_number(number, float, "a size such as 512M or 2G", 0.0) * (1 << shift))


def some_bytes(text: str) -> int:
    """Bytes, at least one."""
    return int(_number(str(size(text)), int, "a size above 0", 1))


def origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an origin such as https://example.org")
    return text


def host_name(text: str) -> str:
    """A name or an address, as it stands in a Host header, but without brackets and port."""
    name = text.strip("[]")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    if not re.fullmatch(r"[^/\s:]+", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host's name such as example.org, without scheme and port")
    return name


def counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer counts such as 14,10") from None


def request_counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of requests such as 1,4,16") from None

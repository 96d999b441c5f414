"""What can be asked of a server: its command line, and what its YAML file and the cards of its models may say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hippo_mpi.config import checks
from hippo_mpi.config.options import ManyOptions, SamplingOptions, TextOptions
from hippo_mpi.config.parser import option, with_default

API_KEYS = "HIPPO_API_KEYS"
"""Environment variable with a server's keys, with commas between."""
MODES = ("completion", "chat", "tools", "thinking")
BACKENDS = ("ring", "mpi", "jaccl", "jaccl-ring")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class CardOptions(TextOptions):
    """All that may be different for each model that a server has."""

    max_tokens: int = with_default(SamplingOptions, "max_tokens", 512)
    modes: Sequence[str] = option(
        (), "what the model may be asked for; by default all it can", nargs="+", choices=MODES
    )


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where a server listens, which models it has, and what it keeps."""

    GROUP: ClassVar = "server"
    address: str = option("127.0.0.1", "address to listen on")
    port: int = option(8080, "port to listen on; 0: any free one", check=checks.port)
    model_name: str | None = option(None, "name of the model in the API; the last part of --model if not given")
    catalogue: Path | None = option(
        None,
        "folder of cards (NAME.yaml: the model's options); any may be asked for; --model NAME says which comes first",
        check=Path,
    )
    rebalance: bool = option(
        False,
        "start the ranks anew, between requests, if another layer split would be at least a tenth faster by what each worked",
    )
    max_queue: int = option(256, "requests that may wait; more get status 429", check=checks.whole)
    max_body_bytes: int = option(4 << 20, "most bytes of a request, such as 4M", check=checks.some_bytes)
    max_choices: int = option(128, "most answers that one request may ask for", check=checks.positive)
    max_schema_bytes: int = option(
        128 << 10,
        "most bytes of the schemas that an answer is held to; each may also take 5 seconds to compile",
        check=checks.size,
    )
    audit_log: Path | None = option(None, "log who asked for what, and how it ended, in this file", check=Path)
    audit_text: bool = option(False, "log prompts and answers, too, and not only digests")
    journal: Path | None = option(
        None, "record requests and answers in this file, so that they survive the server", check=Path
    )
    keep_answers: float = option(86400.0, "seconds for which the journal keeps stored answers", check=checks.at_least_0)
    reconnect: float = option(
        0.0,
        "seconds for which a stream goes on without its client, which may come back by its id; with --journal",
        check=checks.at_least_0,
    )
    check: bool = option(False, "only say what is wrong with these options, if anything is")
    audit_key: Path | None = option(None, "file with that log's key, made if missing; by default FILE.key", check=Path)
    audit_required: bool = option(False, "refuse requests (503) while they can't be logged")
    log_level: str = option("info", "lowest level of the log's lines", choices=LOG_LEVELS)
    log_file: Path | None = option(
        None,
        "append the log to this file instead of stderr; beyond 10 MiB it goes on in a new one, and four of before are kept",
        check=Path,
    )


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """How a server starts its ranks."""

    GROUP: ClassVar = "ranks that this command starts itself"
    hostfile: Path | None = option(None, "JSON list of hosts, as for mlx.launch", check=Path)
    ranks: int = option(2, "ranks on this machine, without a hostfile", check=checks.positive)
    backend: str | None = option(
        None, "with a hostfile; if not given, the one that it names, or ring", choices=BACKENDS
    )
    max_restarts: int = option(
        5, "consecutive rank failures, without progress, that a request survives", check=checks.whole
    )


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Who may ask a server, and how much."""

    GROUP: ClassVar = "who may ask"
    api_key_file: Path | None = option(
        None, f"file with a key a line; or keys in {API_KEYS}, with commas between", check=Path
    )
    admin_key_file: Path | None = option(
        None, "file with keys, a line each, that alone may change the model; by default all may", check=Path
    )
    insecure: bool = option(False, "listen on other addresses without an API key")
    ssl_certfile: Path | None = option(None, "certificate of the server (PEM): encrypt, and serve https", check=Path)
    ssl_keyfile: Path | None = option(None, "its private key, if that is in another file", check=Path)
    allow_origin: Sequence[str] = option(
        (), "origins of web pages that may ask (CORS); *: all", check=checks.origin, nargs="+"
    )
    allow_host: Sequence[str] = option(
        (), "names that clients may call this server by, besides localhost", check=checks.host_name, nargs="+"
    )
    trusted_proxy: Sequence[str] = option(
        (), "addresses of proxies whose X-Forwarded-For is believed", check=checks.network, nargs="+"
    )
    requests_per_minute: int = option(0, "of each key (or address); 0: any number", check=checks.whole)
    tokens_per_minute: int = option(0, "of prompts and answers of each key; 0: any number", check=checks.whole)
    requests_per_key: int | None = option(
        None,
        "under way or waiting at once; 0: any number; by default half of all, if there are several keys",
        check=checks.whole,
    )
    max_connections: int = option(1000, "at once; half of them of one address", check=checks.positive)
    share_prefixes: bool = option(False, "let prompts begin with what was computed for other keys")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(CardOptions, ManyOptions, ServerOptions, StartOptions, AccessOptions):
    """All options of hippo_mpi.serve."""

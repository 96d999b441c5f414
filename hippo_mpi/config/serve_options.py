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
        (), "what clients may use the model for; default: all that it supports", nargs="+", choices=MODES
    )


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where a server listens, which models it has, and what it keeps."""

    GROUP: ClassVar = "server"
    address: str = option("127.0.0.1", "address to listen on")
    port: int = option(8080, "port to listen on; 0: any free one", check=checks.port)
    model_name: str | None = option(None, "name of the model in the API; default: the last part of --model")
    catalogue: Path | None = option(
        None,
        "folder of cards (NAME.yaml: a model's options); clients may ask for any; --model NAME loads first",
        check=Path,
    )
    rebalance: bool = option(
        False,
        "restart the ranks, between requests, with a layer split that would be at least a tenth faster",
    )
    max_queue: int = option(256, "maximum number of waiting requests; further ones get status 429", check=checks.whole)
    max_body_bytes: int = option(4 << 20, "maximum size of a request body, such as 4M", check=checks.some_bytes)
    max_choices: int = option(128, "maximum number of answers per request", check=checks.positive)
    max_schema_bytes: int = option(
        128 << 10,
        "maximum size of an answer's JSON schemas; each may take 5 seconds to compile",
        check=checks.size,
    )
    audit_log: Path | None = option(None, "log every request's key, parameters and outcome to this file", check=Path)
    audit_text: bool = option(False, "log prompts and answers themselves, not only their digests")
    journal: Path | None = option(
        None, "record requests and answers in this file, so that they survive a crash", check=Path
    )
    keep_answers: float = option(86400.0, "seconds that the journal keeps stored answers", check=checks.at_least_0)
    reconnect: float = option(
        0.0,
        "seconds that a stream goes on after its client disconnects, so that it can reconnect by id; needs --journal",
        check=checks.at_least_0,
    )
    check: bool = option(False, "only check the options, and exit")
    audit_key: Path | None = option(
        None, "file with the audit log's key, created if missing; default: FILE.key", check=Path
    )
    audit_required: bool = option(False, "refuse requests (503) while they can't be logged")
    log_level: str = option("info", "lowest level that is logged to stderr", choices=LOG_LEVELS)
    log_file: Path | None = option(
        None, "append the log to this file instead of stderr; rotated at 10 MiB, with four old files kept", check=Path
    )


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """How a server starts its ranks."""

    GROUP: ClassVar = "ranks that this command starts itself"
    hostfile: Path | None = option(None, "JSON list of hosts, as for mlx.launch", check=Path)
    ranks: int = option(2, "ranks on this machine, without a hostfile", check=checks.positive)
    backend: str | None = option(
        None, "MLX backend for a hostfile; default: the one that it names, or ring", choices=BACKENDS
    )
    max_restarts: int = option(
        5, "consecutive rank failures, without progress, that a request survives", check=checks.whole
    )


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Who may ask a server, and how much."""

    GROUP: ClassVar = "access"
    api_key_file: Path | None = option(
        None, f"file of API keys, one per line; or set {API_KEYS}, separated by commas", check=Path
    )
    admin_key_file: Path | None = option(
        None, "file of the only keys that may change the model, one per line; default: all keys may", check=Path
    )
    insecure: bool = option(False, "allow other addresses than localhost without an API key")
    ssl_certfile: Path | None = option(None, "TLS certificate of the server (PEM); turns on https", check=Path)
    ssl_keyfile: Path | None = option(None, "its private key (PEM), if in another file", check=Path)
    allow_origin: Sequence[str] = option(
        (), "origins of web pages that may call the API (CORS); *: all", check=checks.origin, nargs="+"
    )
    allow_host: Sequence[str] = option(
        (), "names in the Host header that are accepted besides localhost", check=checks.host_name, nargs="+"
    )
    trusted_proxy: Sequence[str] = option(
        (), "addresses of proxies whose X-Forwarded-For is trusted", check=checks.network, nargs="+"
    )
    requests_per_minute: int = option(
        0, "requests per minute of each key (or address); 0: no limit", check=checks.whole
    )
    tokens_per_minute: int = option(
        0, "prompt and answer tokens per minute of each key; 0: no limit", check=checks.whole
    )
    requests_per_key: int | None = option(
        None,
        "running and waiting requests of each key; 0: no limit; default: half of all, if there are several keys",
        check=checks.whole,
    )
    max_connections: int = option(1000, "maximum number of connections; half of it per address", check=checks.positive)
    share_prefixes: bool = option(False, "reuse cached prompt prefixes across keys")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(CardOptions, ManyOptions, ServerOptions, StartOptions, AccessOptions):
    """All options of hippo_mpi.serve."""

    @property
    def load(self) -> str:
        """What has to be fast."""
        return self.plan_for or "few"

"""hippo_mpi.serve: an OpenAI API over ranks that are started again when they fail.

    hippo_mpi.serve --model M                                  # two ranks on this machine
    hippo_mpi.serve --hostfile hostfile --model M              # on the hosts of a hostfile; this one is the first
    mlx.launch --hostfile hostfile -n 2 hippo_mpi.serve --model M     # from rank 0, without a supervisor

Clients see a pause, not an error, when a rank fails: every answer goes on from its last token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config

from hippo_mpi import command, config
from hippo_mpi.batch import make_engine
from hippo_mpi.command import Session
from hippo_mpi.engine.text import ChatFormat, open_tokenizer
from hippo_mpi.errors import HippoError, RankError, UserError, print_error
from hippo_mpi.generate import open_text, sampling_params
from hippo_mpi.run import check_hostfile, free_ports
from hippo_mpi.serving.audit_log import AuditLog
from hippo_mpi.serving.config_file import file_options
from hippo_mpi.serving.front import Front
from hippo_mpi.serving.rank_link import FRONT, MAX_LINE_BYTES, About
from hippo_mpi.serving.rank_service import RankService
from hippo_mpi.serving.supervisor import LaunchPlan, Supervisor
from hippo_mpi.transport.world import detect_launch

try:
    import uvicorn

    from hippo_mpi.serving.api import Api, ApiSettings
    from hippo_mpi.serving.metrics import Metrics
except ImportError as missing:
    print_error(f'hippo_mpi.serve needs {missing.name}: pip install "hippo-mpi[serve]"')
    sys.exit(UserError.exit_code)

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEYS = "HIPPO_API_KEYS"


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.serve", description=(__doc__ or "").splitlines()[0])
    config.add_model_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--config", type=Path, help="YAML file of options; those of the command line win")
    group.add_argument("--address", default="127.0.0.1", help="address to listen on")
    group.add_argument("--port", type=config.whole, default=8080, help="port to listen on; 0: any free one")
    group.add_argument("--model-name", help="name of the model in the API; the last part of --model if not given")
    group.add_argument(
        "--api-key-file", type=Path, help=f"file with a key a line; or keys in {KEYS}, with commas between"
    )
    group.add_argument("--insecure", action="store_true", help="listen on other addresses without an API key")
    group.add_argument(
        "--max-queue", type=config.whole, default=256, help="requests that may wait; more get status 429"
    )
    group.add_argument("--audit-log", type=Path, help="write who asked for what, and how it ended, into this file")
    group.add_argument("--audit-text", action="store_true", help="prompts and answers, too, and not only digests")
    group = parser.add_argument_group("ranks that this command starts itself")
    group.add_argument("--hostfile", type=Path, help="JSON list of hosts, as for mlx.launch")
    group.add_argument("--ranks", type=config.positive, default=2, help="ranks on this machine, without a hostfile")
    group.add_argument("--backend", default="ring", help="ring, mpi, jaccl or jaccl-ring, with a hostfile")
    group.add_argument(
        "--max-restarts",
        type=config.whole,
        default=5,
        help="failures in a row, without a token between, that a request bears",
    )
    config.add_prompt_options(parser)
    config.add_sampling_options(parser, max_tokens=512)
    config.add_batch_options(parser)
    config.add_cache_options(parser)
    config.add_run_options(parser)
    return parser


# ---- a rank


def serve_rank(session: Session) -> int:
    """What a launched rank does: rank 0 answers the front, or is one itself if no supervisor has started it."""
    if session.world.rank > 0:
        command.follow(session)
        return 0
    tokenizer, chat_format = open_text(session)
    path = os.environ.get(FRONT)
    if path:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except OSError as error:
            raise RankError(f"the front is gone: {error}") from None
    else:
        keys = read_keys(session.arguments)
        connection, ours = socket.socketpair()
        front = _make_front(session.arguments)
        metrics = Metrics(front, lambda: 0)
        settings = _settings(session.arguments, keys)
        api = Api(front, tokenizer, chat_format, settings, metrics, _audit_log(session.arguments))
        threading.Thread(
            target=_serve_unsupervised, args=(session, front, api, ours), name="hippo-http", daemon=True
        ).start()
    service = RankService(connection, session.control)
    pipeline = session.load()
    engine = make_engine(session, pipeline, tokenizer)
    about = About(session.agreement.max_context, session.agreement.vocab_size, [pipeline.statistics()])
    service.run(engine, about)
    pipeline.end()
    return 0


def _serve_unsupervised(session: Session, front: Front, api: Api, ours: socket.socket) -> None:
    """The front, in a thread of rank 0: it ends with the rank."""

    async def both() -> None:
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        ranks = asyncio.ensure_future(front.serve_ranks(reader, writer, session.arguments.timeout))
        await _serve_http(session.arguments, front, api)
        ranks.cancel()

    try:
        asyncio.run(both())
    except HippoError as error:
        session.control.fail(error)


# ---- the front


def serve(argv: list[str]) -> int:
    """Start the ranks, watch them, and serve, until a signal ends it.

    Raises:
        HippoError: in one line.
    """
    argv = with_file_options(make_parser(), argv)
    arguments = make_parser().parse_args(argv)
    keys = read_keys(arguments)
    tokenizer, chat_format = _open_text(arguments)
    front = _make_front(arguments)
    plan = _launch_plan(arguments, argv)
    supervisor = Supervisor(front, plan, free_ports, arguments.timeout, arguments.max_restarts)
    metrics = Metrics(front, lambda: supervisor.num_restarts)
    api = Api(front, tokenizer, chat_format, _settings(arguments, keys), metrics, _audit_log(arguments))
    asyncio.run(_serve_supervised(arguments, front, api, supervisor))
    return 0


async def _serve_supervised(arguments: argparse.Namespace, front: Front, api: Api, supervisor: Supervisor) -> None:
    ranks = asyncio.ensure_future(supervisor.run())
    http = asyncio.ensure_future(_serve_http(arguments, front, api))
    try:
        await asyncio.wait({ranks, http}, return_when="FIRST_COMPLETED")
    finally:
        for task in (ranks, http):
            task.cancel()
        done, _ = await asyncio.wait({ranks, http})
    for task in done:
        if not task.cancelled():
            task.result()


async def _serve_http(arguments: argparse.Namespace, front: Front, api: Api) -> None:
    """Serve until a signal comes."""
    try:
        listener = socket.create_server((arguments.address, arguments.port), backlog=256)
    except OSError as error:
        raise UserError(f"can't listen on {arguments.address}:{arguments.port}: {error.strerror}") from None
    port = listener.getsockname()[1]
    settings = uvicorn.Config(
        api.app(), lifespan="off", log_level="warning", timeout_keep_alive=30, timeout_graceful_shutdown=2
    )
    sys.stderr.write(f"listening on http://{arguments.address}:{port}\n")
    sys.stderr.flush()
    announcing = asyncio.ensure_future(_announce(front))
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has ended
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    server = uvicorn.Server(settings)
    ending = asyncio.ensure_future(_end_answers(server, front))
    await server.serve([listener])
    announcing.cancel()
    ending.cancel()


async def _end_answers(server: uvicorn.Server, front: Front) -> None:
    """When a signal has come: clients are told, in words."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    front.fail_all(RankError("the server is ending"))


async def _announce(front: Front) -> None:
    while not front.is_ready:
        await asyncio.sleep(0.1)
    sys.stderr.write("ready\n")
    sys.stderr.flush()


def _make_front(arguments: argparse.Namespace) -> Front:
    return Front(arguments.max_batch_size + arguments.max_queue)


def _settings(arguments: argparse.Namespace, keys: tuple[str, ...]) -> ApiSettings:
    defaults = replace(sampling_params(arguments), seed=arguments.seed)
    return ApiSettings(arguments.model_name or Path(arguments.model).name, keys, defaults, arguments.system_prompt)


def _audit_log(arguments: argparse.Namespace) -> AuditLog | None:
    return AuditLog(arguments.audit_log, arguments.audit_text) if arguments.audit_log else None


def _open_text(arguments: argparse.Namespace) -> tuple[TokenizerWrapper, ChatFormat]:
    path = command.find_model(arguments.model, arguments.revision, lambda: None)
    eos = load_config(path).get("eos_token_id")
    tokenizer = open_tokenizer(path, eos, tuple(arguments.extra_eos_token), arguments.trust_remote_code)
    format = ChatFormat(arguments.ignore_chat_template, arguments.chat_template_config, arguments.prefill_response)
    return tokenizer, format


def with_file_options(parser: config.Parser, argv: list[str]) -> list[str]:
    """The command line with the options of its --config file in front, so that ranks don't need the file."""
    finder = config.Parser(add_help=False)
    finder.add_argument("--config", type=Path)
    found, rest = finder.parse_known_args(argv)
    return [*file_options(found.config, parser), *rest] if found.config else argv


def _launch_plan(arguments: argparse.Namespace, argv: list[str]) -> LaunchPlan:
    if arguments.hostfile is None:
        return LaunchPlan([sys.executable, "-m", "hippo_mpi.serve", *argv], arguments.ranks)
    hosts = check_hostfile(arguments.hostfile)
    if all(host["ssh"] in _LOOPBACK for host in hosts) and arguments.backend == "ring":
        return LaunchPlan([sys.executable, "-m", "hippo_mpi.serve", *argv], len(hosts))
    launcher = [str(Path(sys.executable).parent / "mlx.launch"), "--hostfile", str(arguments.hostfile)]
    return LaunchPlan(["hippo_mpi.serve", *argv], launcher=[*launcher, "--backend", arguments.backend])


def read_keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The API keys, from a file or the environment.

    Raises:
        UserError: the file can't be read, or there is none and others may connect.
    """
    keys = os.environ.get(KEYS, "").split(",")
    if arguments.api_key_file:
        try:
            keys += arguments.api_key_file.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {arguments.api_key_file} can't be read: {error}") from None
    found = tuple(key.strip() for key in keys if key.strip())
    if not found and arguments.address not in _LOOPBACK and not arguments.insecure:
        raise UserError(
            f"others could reach {arguments.address} without an API key: give --api-key-file or {KEYS}, or --insecure"
        )
    return found


def main() -> NoReturn:
    argv = sys.argv[1:]
    try:
        is_rank = FRONT in os.environ or bool(detect_launch().backend)
        if is_rank:
            command.run(make_parser(), serve_rank, with_file_options(make_parser(), argv))
        sys.exit(serve(argv))
    except HippoError as error:
        print_error(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

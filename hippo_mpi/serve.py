"""hippo_mpi.serve: an OpenAI API over ranks that are started again when they fail.

    hippo_mpi.serve --model M                                  # two ranks on this machine
    hippo_mpi.serve --hostfile hostfile --model M              # on the hosts of a hostfile; this one is the first
    hippo_mpi.serve --config hippo.yaml                        # options, hosts and models in one file
    mlx.launch --hostfile hostfile -n 2 hippo_mpi.serve --model M     # from rank 0, without a supervisor

Clients see a pause, not an error, when a rank fails: every answer goes on from its last token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hippo_mpi.cluster.host_checks import Host
from hippo_mpi.cluster.hosts import check_hosts, installed, knock, read_hostfile
from hippo_mpi.config import API_KEYS, Parser
from hippo_mpi.durable_files import check_place
from hippo_mpi.errors import HippoError, RankError, UserError, install_hint, print_error
from hippo_mpi.planning.layer_split import check_layer_split
from hippo_mpi.runtime.assembly import build_engine, open_text
from hippo_mpi.runtime.entry import run
from hippo_mpi.runtime.session import Session
from hippo_mpi.serving.addresses import is_loopback
from hippo_mpi.serving.api.audit_log import AuditLog
from hippo_mpi.serving.config_file import ConfigFile, make_parser, read_config
from hippo_mpi.serving.key_files import keys_of_environment, read_key_file
from hippo_mpi.serving.logs import set_up_logging
from hippo_mpi.serving.supervision.catalogue import Catalogue, ServedModel, read_catalogue
from hippo_mpi.serving.supervision.front import Front
from hippo_mpi.serving.supervision.messages import FRONT, MAX_LINE_BYTES, RankPart, Ready
from hippo_mpi.serving.supervision.rank_service import BEAT_S, RankService
from hippo_mpi.serving.supervision.supervisor import LaunchPlan, Supervisor
from hippo_mpi.transport.run_key import RunKey
from hippo_mpi.transport.world import detect_launch

try:
    from hippo_mpi.serving.api.access import Access, AccessRules
    from hippo_mpi.serving.api.endpoints import Api
    from hippo_mpi.serving.api.http_server import HttpSettings, serve_http
    from hippo_mpi.serving.api.journal import Journal
    from hippo_mpi.serving.api.metrics import Metrics
    from hippo_mpi.serving.api.request_bodies import ApiSettings
except ImportError as missing:
    print_error(f"hippo_mpi.serve needs {missing.name}: {install_hint('serve')}")
    sys.exit(UserError.exit_code)

_PYTHON_START_S = 30.0  # imports from a cold disk, and a launcher's ssh
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


# ---- a rank


def serve_rank(session: Session) -> int:
    """What a launched rank does: rank 0 answers the front, or is one itself if no supervisor has started it."""
    if session.world.rank > 0:
        session.follow()
        return 0
    path = os.environ.get(FRONT)
    if path:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except OSError as error:
            raise RankError(f"the front is gone: {error}") from None
    else:
        connection = _start_own_front(session)
    service = RankService(connection, session.control)  # beats from here on: what follows may have to be downloaded
    tokenizer, _ = open_text(session)
    pipeline = session.load()
    engine = build_engine(session, pipeline, tokenizer)
    split, vocab_size = session.agreement.split, session.agreement.vocab_size
    assert split is not None  # rank 0 has planned
    parts = [RankPart(stage.machine.name, (stage.start, stage.stop), stage.weight_bytes) for stage in split.stages]
    ready = Ready(split.max_context, vocab_size, parts, [stage.machine for stage in split.stages])
    service.run(engine, ready, pipeline.timeline)
    pipeline.end()
    return 0


def _start_own_front(session: Session) -> socket.socket:
    """Serve from a thread of rank 0, which ends with the rank; returns rank 0's connection to it."""
    arguments = session.arguments
    if arguments.catalogue:
        raise UserError("a launcher starts the ranks of one model: for a catalogue, start hippo_mpi.serve without one")
    set_up_logging(arguments.log_level)
    catalogue = Catalogue([ServedModel(arguments.model_name or Path(arguments.model).name, arguments)])
    front, api, http = _make_api(arguments, catalogue)
    connection, ours = socket.socketpair()

    async def both() -> None:
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        ranks = asyncio.ensure_future(front.serve_ranks(reader, writer, _silence_s(arguments)))
        await _serve_api(front, api, http)
        ranks.cancel()

    def serve_unsupervised() -> None:
        try:
            asyncio.run(both())
        except HippoError as error:
            session.control.fail(error)

    threading.Thread(target=serve_unsupervised, name="hippo-http", daemon=True).start()
    return connection


# ---- the front


def serve(argv: list[str]) -> int:
    """Start the ranks, watch them, and serve, until a signal ends it.

    Raises:
        HippoError: in one line.
    """
    file, argv = read_command_line(argv)
    arguments = make_parser().parse_args(argv)
    set_up_logging(arguments.log_level)
    catalogue = _read_models(arguments, argv, file)
    _ = catalogue.first.modes  # a mistake is told before anything is started
    named = _named_hosts(arguments, file)
    _check(arguments, catalogue, len(named) or arguments.ranks)
    if arguments.check:
        return 0
    hosts = _hosts(arguments, named)
    front, api, http = _make_api(arguments, catalogue)

    async def make_plan(name: str, living: Sequence[int] | None) -> LaunchPlan:
        model = catalogue.find(name)
        assert model is not None
        if living is not None and len(front.machines) == len(hosts):
            await catalogue.plan(model, [front.machines[index] for index in living])
        return launch_plan([*argv, *model.options], arguments, hosts, living)

    start_s = _PYTHON_START_S + arguments.start_timeout  # so that ranks which wait in vain say so themselves
    supervisor = Supervisor(front, make_plan, hosts, start_s, _silence_s(arguments), arguments.max_restarts)
    asyncio.run(_serve_supervised(front, api, http, supervisor))
    return 0


def _check(arguments: argparse.Namespace, catalogue: Catalogue, num_ranks: int) -> None:
    """Raise a UserError for what a start would refuse, as far as that can be told beside a server that runs."""
    read_rules(arguments)
    HttpSettings.from_options(arguments)
    _check_combinations(arguments)
    for option, path in (("--audit-log", arguments.audit_log), ("--journal", arguments.journal)):
        if path is not None:
            check_place(path, option)
    for name in catalogue.names:
        model = catalogue.find(name)
        if model is not None and model.arguments.layer_split is not None:
            check_layer_split(model.info, num_ranks, model.arguments.layer_split)


async def _serve_api(front: Front, api: Api, settings: HttpSettings) -> None:
    """Serve, from what the server before this one has left on, until a signal comes."""
    api.start()
    try:
        await serve_http(api.app(), front, settings)
    finally:
        api.exchanges.close()


async def _serve_supervised(front: Front, api: Api, settings: HttpSettings, supervisor: Supervisor) -> None:
    ranks = asyncio.ensure_future(supervisor.run())
    http = asyncio.ensure_future(_serve_api(front, api, settings))
    try:
        await asyncio.wait({ranks, http}, return_when="FIRST_COMPLETED")
    finally:
        for task in (ranks, http):
            task.cancel()
        done, _ = await asyncio.wait({ranks, http})
    for task in done:
        if not task.cancelled():
            task.result()


def _silence_s(arguments: argparse.Namespace) -> float:
    """Return after how long without a beat rank 0 counts as lost: a few beats at least."""
    return float(max(arguments.timeout, 4 * BEAT_S))


def _make_api(arguments: argparse.Namespace, catalogue: Catalogue) -> tuple[Front, Api, HttpSettings]:
    rules = read_rules(arguments)
    access = Access(rules)
    http = HttpSettings.from_options(arguments)
    front = Front(arguments.max_batch_size + arguments.max_queue, catalogue.first.name)
    audit = _open_audit_log(arguments)
    settings = ApiSettings(
        arguments.max_body_bytes,
        max_choices=arguments.max_choices,
        max_schema_bytes=arguments.max_schema_bytes,
        origins=tuple(arguments.allow_origin),
        hosts=_allowed_hosts(arguments),
        has_keys=bool(rules.keys),
        keep_answers_s=arguments.keep_answers,
        reconnect_s=arguments.reconnect,
        needs_audit=arguments.audit_required,
    )
    if arguments.journal:
        check_place(arguments.journal, "--journal")
    journal = Journal(arguments.journal) if arguments.journal else None
    return front, Api(front, catalogue, access, settings, Metrics(front, audit), audit, journal), http


def _open_audit_log(arguments: argparse.Namespace) -> AuditLog | None:
    _check_combinations(arguments)
    if not arguments.audit_log:
        return None
    return AuditLog(arguments.audit_log, arguments.audit_text, arguments.audit_key)


def _check_combinations(arguments: argparse.Namespace) -> None:
    """Raise a UserError for options of an audit log or a journal without one."""
    if arguments.reconnect and not arguments.journal:
        raise UserError("--reconnect needs --journal FILE")
    if arguments.audit_log:
        return
    for name in ("audit_text", "audit_key", "audit_required"):
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} needs --audit-log FILE")


def read_command_line(argv: list[str]) -> tuple[ConfigFile, list[str]]:
    """What the --config file says, and the command line with its options in front, so that ranks don't need the file."""
    finder = Parser(add_help=False)
    finder.add_argument("--config", type=Path)
    found, rest = finder.parse_known_args(argv)
    if found.config is None:
        return ConfigFile(), argv
    file = read_config(found.config)
    return file, [*file.options, *rest]


def _read_models(arguments: argparse.Namespace, argv: list[str], file: ConfigFile) -> Catalogue:
    """The cards of the file and of the folder; without any, the one model of the command line."""
    cards = dict(file.cards)
    for name, options in (read_catalogue(arguments.catalogue) if arguments.catalogue else {}).items():
        if name in cards:
            raise UserError(f"the model {name!r} is both in --catalogue and in --config")
        cards[name] = options
    if not cards:
        return Catalogue([ServedModel(arguments.model_name or Path(arguments.model).name, arguments)])
    if arguments.model_name:
        raise UserError("--model-name is for one model; those of a catalogue have names")
    models = [ServedModel(name, make_parser().parse_args([*argv, *own]), own) for name, own in cards.items()]
    if arguments.model != make_parser().get_default("model"):
        if arguments.model not in cards:
            raise UserError(f"--model {arguments.model} is not in the catalogue: {', '.join(cards)}")
        models.sort(key=lambda model: model.name != arguments.model)
    return Catalogue(models)


def _hosts(arguments: argparse.Namespace, named: list[Host]) -> list[Host]:
    """Return where ranks are to be, rank 0's first; none: on this machine only, without a launcher.

    Raises:
        LaunchError: a host doesn't let us in.
    """
    if all(host["ssh"] in _LOOPBACK for host in named) and arguments.backend == "ring":
        arguments.ranks = len(named) or arguments.ranks
        return []
    knock(named, str(arguments.hostfile or arguments.config), RunKey())  # later, a host that doesn't answer is left out
    return named


def _named_hosts(arguments: argparse.Namespace, file: ConfigFile) -> list[Host]:
    """Return the hosts of the file or of the hostfile, checked; none if there are none.

    Raises:
        LaunchError: a host isn't there.
    """
    if file.hosts:
        check_hosts(file.hosts, f"{arguments.config or 'the configuration'}: hosts")
        return file.hosts
    return read_hostfile(arguments.hostfile) if arguments.hostfile else []


def launch_plan(
    argv: list[str], arguments: argparse.Namespace, hosts: Sequence[Host], living: Sequence[int] | None
) -> LaunchPlan:
    """How ranks with this command line are started: on all hosts, or on some of them."""
    if not hosts:
        return LaunchPlan([sys.executable, "-m", "hippo_mpi.serve", *argv], arguments.ranks)
    if living is not None:
        argv, hosts = _without_layer_split(argv), [hosts[index] for index in living]
    launcher = [installed("mlx.launch"), "--backend", arguments.backend]
    return LaunchPlan([installed("hippo_mpi.serve"), *argv], launcher=launcher, hosts=hosts)


def _without_layer_split(argv: list[str]) -> list[str]:
    """It was for another number of ranks."""
    finder = Parser(add_help=False)
    finder.add_argument("--layer-split")
    return finder.parse_known_args(argv)[1]


def read_rules(arguments: argparse.Namespace) -> AccessRules:
    """Who may ask, by the command line and the environment.

    Raises:
        UserError: keys can't be read, or there are none and others may connect.
    """
    keys, admin_keys = keys_of_environment(), tuple[str, ...]()
    if arguments.api_key_file:
        keys += read_key_file(arguments.api_key_file, "--api-key-file")
    if arguments.admin_key_file:
        admin_keys += read_key_file(arguments.admin_key_file, "--admin-key-file")
    if not keys and not is_loopback(arguments.address) and not arguments.insecure:
        raise UserError(
            f"others could reach {arguments.address} without an API key: give --api-key-file or {API_KEYS}, or --insecure"
        )
    most, most_of_key = arguments.max_batch_size + arguments.max_queue, arguments.requests_per_key
    if most_of_key is None:
        most_of_key = max(1, most // 2) if len({*keys, *admin_keys}) > 1 else 0
    rates = arguments.requests_per_minute, arguments.tokens_per_minute
    return AccessRules(keys, admin_keys, *rates, most, most_of_key, arguments.share_prefixes)


def _allowed_hosts(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Names that a Host header may have; none: any. Where others reach the server, it doesn't know what they call it."""
    if not is_loopback(arguments.address) and not arguments.allow_host:
        return ()
    return (*_LOOPBACK, arguments.address, *arguments.allow_host)


def main() -> NoReturn:
    argv = sys.argv[1:]
    try:
        if FRONT in os.environ or detect_launch().backend:
            file, argv = read_command_line(argv)
            if file.cards or file.hosts:
                raise UserError("a launcher has chosen the hosts and starts one model: leave hosts and models out")
            run(make_parser(), serve_rank, argv)
        sys.exit(serve(argv))
    except HippoError as error:
        print_error(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

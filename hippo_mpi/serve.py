"""hippo_mpi.serve: serve an OpenAI and Anthropic API from ranks that are restarted when they fail.

    hippo_mpi.serve --model M                                  # two ranks on this machine
    hippo_mpi.serve --hostfile hostfile --model M              # on the hosts of a hostfile; this one is the first
    hippo_mpi.serve --config hippo.yaml                        # options, hosts and models in one file
    hippo_mpi.serve install --config hippo.yaml                # as a service that starts at boot; `uninstall` ends it
    mlx.launch --hostfile hostfile -n 2 hippo_mpi.serve --model M     # from rank 0, without a supervisor

Clients see a pause, not an error, when a rank fails: every answer goes on from its last token.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hippo_mpi.cluster.hostfile import Hostfile, hostfile_of, read_hostfile
from hippo_mpi.cluster.hosts import check_hosts, knock
from hippo_mpi.config.parser import OptionsParser
from hippo_mpi.config.serve_options import API_KEYS, CardOptions, ServeOptions
from hippo_mpi.config.yaml_file import ConfigFile, all_cards, read_config, take_config, without_option, words_of
from hippo_mpi.durable_files import check_place
from hippo_mpi.errors import HippoError, RankError, UserError, install_hint, print_error
from hippo_mpi.planning.layer_split import check_layer_split
from hippo_mpi.runtime.assembly import build_engine, open_text
from hippo_mpi.runtime.entry import run
from hippo_mpi.runtime.session import Session
from hippo_mpi.serving.addresses import is_loopback
from hippo_mpi.serving.api.audit_log import AuditLog
from hippo_mpi.serving.key_files import keys_of_environment, read_key_file
from hippo_mpi.serving.logs import log_to, set_up_logging
from hippo_mpi.serving.service import install, service_of, uninstall
from hippo_mpi.serving.supervision.catalogue import Catalogue, ServedModel
from hippo_mpi.serving.supervision.messages import FRONT, MAX_LINE_BYTES, RankPart, Ready
from hippo_mpi.serving.supervision.rank_service import BEAT_S, RankService
from hippo_mpi.serving.supervision.rebalancing import watch_balance
from hippo_mpi.serving.supervision.request_broker import RequestBroker
from hippo_mpi.serving.supervision.supervisor import LaunchPlan, Supervisor
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


def serve_rank(session: Session[ServeOptions]) -> int:
    """Serve as a launched rank: rank 0 answers the front, or is one itself if no supervisor has started it."""
    if session.world.rank > 0:
        session.follow()
        return 0
    path = os.environ.get(FRONT)
    if path:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except OSError as error:
            raise RankError(f"can't connect to the front: {error}") from None
    else:
        connection = _start_own_front(session)
    service = RankService(connection, session.control)  # beats from here on: what follows may have to be downloaded
    tokenizer, _ = open_text(session)
    pipeline = session.load()
    engine = build_engine(session, pipeline, tokenizer)
    planned, vocab_size = session.agreement.planned, session.agreement.vocab_size
    assert planned is not None  # as this is rank 0
    split = planned.split
    parts = [RankPart(stage.machine.name, (stage.start, stage.stop), stage.weight_bytes) for stage in split.stages]
    ready = Ready(split.max_context, vocab_size, parts, [stage.machine for stage in split.stages], planned.name)
    service.run(engine, ready, pipeline.timeline)
    pipeline.end()
    return 0


def _start_own_front(session: Session[ServeOptions]) -> socket.socket:
    """Serve from a thread of rank 0, which ends with the rank; returns rank 0's connection to it."""
    options = session.options
    if options.catalogue:
        raise UserError(
            "--catalogue doesn't work under a launcher, which starts one model: start hippo_mpi.serve directly"
        )
    set_up_logging(options.log_level)
    catalogue = Catalogue([ServedModel(options.model_name or Path(options.model).name, options)])
    if options.log_file:
        log_to(options.log_file)
    broker, api, http = _make_api(options, catalogue)
    connection, ours = socket.socketpair()

    async def both() -> None:
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        ranks = asyncio.ensure_future(broker.serve_ranks(reader, writer, _silence_s(options)))
        await _serve_api(broker, api, http)
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
    options = make_parser().read(argv)
    set_up_logging(options.log_level)
    catalogue = _read_models(options, argv, file)
    _ = catalogue.first.modes  # a mistake is told before anything is started
    hostfile = _read_hosts(options, file)
    options = replace(options, ranks=len(hostfile.hosts) if hostfile else options.ranks)
    _check(options, catalogue)
    if options.check:
        return 0
    if options.log_file:  # what is wrong with the command line was told where it was typed
        log_to(options.log_file)
    if hostfile is not None:
        if _is_here(options, hostfile):
            hostfile = None
        else:
            knock(hostfile)  # later, a host that doesn't answer is left out
    hosts = hostfile.hosts if hostfile else ()
    broker, api, http = _make_api(options, catalogue)

    async def make_plan(name: str, living: Sequence[int] | None) -> LaunchPlan:
        model = catalogue.find(name)
        assert model is not None
        if living is not None and len(broker.machines) == len(hosts):
            machines = [broker.machines[index] for index in living]
            await catalogue.beside(lambda: model.plan(machines))
        return launch_plan([*argv, *model.card, *_split_words(broker, name)], options, hostfile, living)

    start_s = _PYTHON_START_S + options.start_timeout  # so that ranks which wait in vain say so themselves
    supervisor = Supervisor(broker, make_plan, hosts, start_s, _silence_s(options), options.max_restarts)
    jobs = [supervisor.run(), _serve_api(broker, api, http)]
    if options.parallel == "pipeline":
        jobs.append(watch_balance(broker, catalogue, is_taken=options.rebalance))
    asyncio.run(_until_first_ends(jobs))
    return 0


def _split_words(broker: RequestBroker, model: str) -> list[str]:
    """Return the option for the layer split that work has shown to be better."""
    split = broker.layer_splits.get(model)
    return ["--layer-split", ",".join(map(str, split))] if split else []


def _check(options: ServeOptions, catalogue: Catalogue) -> None:
    """Raise a UserError for what a start would refuse, as far as that can be told beside a server that runs."""
    read_rules(options)
    HttpSettings.from_options(options)
    _check_combinations(options)
    for option, path in (("--audit-log", options.audit_log), ("--journal", options.journal)):
        if path is not None:
            check_place(path, option)
    for name in catalogue.names:
        model = catalogue.find(name)
        if model is not None and model.options.layer_split is not None:
            num_stages = model.options.stages
            check_layer_split(model.info, num_stages if num_stages > 1 else options.ranks, model.options.layer_split)


async def _serve_api(broker: RequestBroker, api: Api, settings: HttpSettings) -> None:
    """Serve, from what the server before this one has left on, until a signal comes."""
    api.start()
    try:
        await serve_http(api.app(), broker, settings)
    finally:
        api.exchanges.close()


async def _until_first_ends(jobs: Sequence[Coroutine[Any, Any, None]]) -> None:
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
    finally:
        for task in tasks:
            task.cancel()
        done, _ = await asyncio.wait(tasks)
    for task in done:
        if not task.cancelled():
            task.result()


def _silence_s(options: ServeOptions) -> float:
    """Return after how long without a beat rank 0 counts as lost: a few beats at least."""
    return float(max(options.timeout, 4 * BEAT_S))


def _make_api(options: ServeOptions, catalogue: Catalogue) -> tuple[RequestBroker, Api, HttpSettings]:
    rules = read_rules(options)
    access = Access(rules)
    http = HttpSettings.from_options(options)
    broker = RequestBroker(options.max_batch_size + options.max_queue, catalogue.first.name)
    audit = _open_audit_log(options)
    settings = ApiSettings(
        options.max_body_bytes,
        max_choices=options.max_choices,
        max_schema_bytes=options.max_schema_bytes,
        origins=tuple(options.allow_origin),
        hosts=_allowed_hosts(options),
        has_keys=bool(rules.keys),
        keep_answers_s=options.keep_answers,
        reconnect_s=options.reconnect,
        needs_audit=options.audit_required,
    )
    if options.journal:
        check_place(options.journal, "--journal")
    journal = Journal(options.journal) if options.journal else None
    return broker, Api(broker, catalogue, access, settings, Metrics(broker, audit), audit, journal), http


def _open_audit_log(options: ServeOptions) -> AuditLog | None:
    _check_combinations(options)
    if not options.audit_log:
        return None
    return AuditLog(options.audit_log, options.audit_text, options.audit_key)


def _check_combinations(options: ServeOptions) -> None:
    """Raise a UserError for options that don't go together, or that need another one."""
    if options.rebalance and options.layer_split:
        raise UserError("--rebalance finds the layer split: leave out --layer-split, or --rebalance")
    if options.rebalance and options.parallel != "pipeline":
        raise UserError(
            f"--rebalance moves layers between the ranks of a pipeline: leave it out, or --parallel {options.parallel}"
        )
    if options.reconnect and not options.journal:
        raise UserError("--reconnect needs --journal FILE")
    if options.audit_log:
        return
    for name in ("audit_text", "audit_key", "audit_required"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} needs --audit-log FILE")


def read_command_line(argv: list[str]) -> tuple[ConfigFile, list[str]]:
    """Return what the --config file says, and the command line with its options in front: ranks don't need the file."""
    path, rest = take_config(argv)
    if path is None:
        return ConfigFile(), argv
    file = read_config(path)
    return file, [*words_of(file.settings, ServeOptions), *rest]


def make_parser() -> OptionsParser[ServeOptions]:
    """Return the parser of the command line."""
    description = "Serve an OpenAI and Anthropic API from ranks that are restarted when they fail."
    epilog = "hippo_mpi.serve install OPTIONS runs it as a service that starts at boot; hippo_mpi.serve uninstall removes it."
    return OptionsParser(ServeOptions, prog="hippo_mpi.serve", description=description, epilog=epilog)


def _read_models(options: ServeOptions, argv: list[str], file: ConfigFile) -> Catalogue:
    """Return the models of the cards of the file and of the folder; without any, the one of the command line."""
    cards = all_cards(file, options.catalogue)
    if not cards:
        return Catalogue([ServedModel(options.model_name or Path(options.model).name, options)])
    if options.model_name:
        raise UserError("--model-name is for a single model; those of a catalogue have their own names")
    models = [
        ServedModel(name, make_parser().read([*argv, *words]), words)
        for name, words in ((name, words_of(card, CardOptions)) for name, card in cards.items())
    ]
    if options.model != ServeOptions.model:
        if options.model not in cards:
            raise UserError(f"--model {options.model} is not in the catalogue: {', '.join(cards)}")
        models.sort(key=lambda model: model.name != options.model)
    return Catalogue(models)


def _backend(options: ServeOptions, hostfile: Hostfile) -> str:
    return options.backend or hostfile.backend or "ring"


def _read_hosts(options: ServeOptions, file: ConfigFile) -> Hostfile | None:
    """Return the hosts of the file or of the hostfile, checked; None if there are none.

    Raises:
        LaunchError: a host isn't there, or doesn't say what the backend needs.
    """
    if not file.hosts and not options.hostfile:
        return None
    hostfile = read_hostfile(options.hostfile) if options.hostfile else hostfile_of(file.hosts, file.lines["hosts"])
    hostfile.check(_backend(options, hostfile))
    check_hosts(hostfile)
    return hostfile


def _is_here(options: ServeOptions, hostfile: Hostfile) -> bool:
    """Return True if all ranks are to be on this machine, where they need no launcher."""
    return all(host.ssh in _LOOPBACK for host in hostfile.hosts) and _backend(options, hostfile) == "ring"


def launch_plan(
    argv: list[str], options: ServeOptions, hostfile: Hostfile | None, living: Sequence[int] | None
) -> LaunchPlan:
    """Return how ranks with this command line are started: on all hosts, or on the `living` ones.

    Raises:
        LaunchError: the living ones aren't joined in a way that the backend needs.
    """
    if hostfile is None:
        return LaunchPlan(["-m", "hippo_mpi.serve", *argv], options.ranks)
    backend = _backend(options, hostfile)
    if living is not None:
        words = ["--layer-split", "--width-split", "--layout"]  # were for another number of ranks
        if options.stages > 1 and (len(living) % options.stages or len(living) == options.stages):
            words.append("--stages")
        for word in words:
            argv = without_option(argv, word)
        hostfile = hostfile.only(living)
        backend = "ring" if len(living) == 1 else backend
        hostfile.check(backend)
    return LaunchPlan(["-m", "hippo_mpi.serve", *argv], hostfile=hostfile, backend=backend)


def read_rules(options: ServeOptions) -> AccessRules:
    """Return who may ask, by the command line and the environment.

    Raises:
        UserError: keys can't be read, or there are none and others may connect.
    """
    keys, admin_keys = keys_of_environment(), tuple[str, ...]()
    if options.api_key_file:
        keys += read_key_file(options.api_key_file, "--api-key-file")
    if options.admin_key_file:
        admin_keys += read_key_file(options.admin_key_file, "--admin-key-file")
    if not keys and not is_loopback(options.address) and not options.insecure:
        raise UserError(
            f"others could reach {options.address} without an API key: give --api-key-file or {API_KEYS}, or --insecure"
        )
    most, most_of_key = options.max_batch_size + options.max_queue, options.requests_per_key
    if most_of_key is None:
        most_of_key = max(1, most // 2) if len({*keys, *admin_keys}) > 1 else 0
    rates = options.requests_per_minute, options.tokens_per_minute
    return AccessRules(keys, admin_keys, *rates, most, most_of_key, options.share_prefixes)


def _allowed_hosts(options: ServeOptions) -> tuple[str, ...]:
    """Return the names that a Host header may have; none: any. Where others reach the server, it doesn't know what they call it."""
    if not is_loopback(options.address) and not options.allow_host:
        return ()
    return (*_LOOPBACK, options.address, *options.allow_host)


def _install(argv: list[str]) -> int:
    """Make a service of a server with this command line, if it is one that could start; return the exit status."""
    code = serve([*argv, "--check"])
    if API_KEYS in os.environ:
        raise UserError(f"a service doesn't see {API_KEYS}: write the keys into a file, and give --api-key-file")
    return code or install(service_of(argv))


def main() -> NoReturn:
    """Run the command on this process's command line; ends the process."""
    argv = sys.argv[1:]
    try:
        if argv[:1] == ["install"]:
            sys.exit(_install(argv[1:]))
        if argv == ["uninstall"]:
            sys.exit(uninstall(service_of([])))
        if FRONT in os.environ or detect_launch().backend:
            file, argv = read_command_line(argv)
            if file.cards or file.hosts:
                raise UserError(
                    "under a launcher, which chooses the hosts and starts one model, --config can't have hosts or models"
                )
            run(make_parser(), serve_rank, argv)
        sys.exit(serve(argv))
    except HippoError as error:
        print_error(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

"""hippo_mpi.cluster top: what hosts do, live in the terminal."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import termios
import time
import tty
from argparse import ArgumentTypeError
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live

from hippo_mpi.cluster.top.top import Watch
from hippo_mpi.cluster.top.top_view import screen, to_object
from hippo_mpi.cluster.verbs.host_options import HostOptions, hosts_meant
from hippo_mpi.config.parser import option
from hippo_mpi.errors import RankError, UserError, unread
from hippo_mpi.transport.terminal import changed_terminal

_REFRESH_S = 0.5
_LINE_S = 1.0
_PIPE_WIDTH, _MAX_LINES = 200, 1000  # where there is no terminal
_KEYS = "; q leaves"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ArgumentTypeError(f"{text!r} is no URL of a server, such as http://127.0.0.1:8080")
    return text


@dataclass(frozen=True, kw_only=True)
class Options(HostOptions):
    """All options of the verb."""

    server: str | None = option(
        None, "URL of a server, to show its ranks, too; its key from HIPPO_API_KEYS", check=_url, metavar="URL"
    )
    once: bool = option(False, "print it once, and stop")
    json: bool = option(False, "print a JSON object a second; with --once, one")


def run(options: Options) -> int:
    """Show what hosts do, until somebody leaves; return the exit status.

    Raises:
        UserError: there is no terminal.
        HippoError: whoever read the lines has gone.
    """
    if not (options.once or options.json) and not (os.isatty(0) and os.isatty(1)):
        raise UserError("top needs a terminal; --once prints it once, --json is for programs")
    watch = Watch(hosts_meant(options), options.server, options.timeout)
    try:
        if options.once:
            return asyncio.run(_once(watch, options))
        return asyncio.run(_lines(watch) if options.json else _live(watch))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise unread() from None


async def _once(watch: Watch, options: Options) -> int:
    ends_s = time.monotonic() + options.timeout + _LINE_S  # for hosts to be given up
    async with watch.running():
        while not watch.is_told and time.monotonic() < ends_s:
            await asyncio.sleep(0.05)
        now_s = time.monotonic()
        if options.json:
            print(json.dumps(to_object(watch.hosts, watch.server, now_s)))
        else:
            width = Console().width if os.isatty(1) else _PIPE_WIDTH
            Console(width=width).print(screen(watch.hosts, watch.server, now_s, (width, _MAX_LINES)))
    return RankError.exit_code if any(host.trouble(now_s) for host in watch.hosts) else 0


async def _lines(watch: Watch) -> int:
    leave = _leave_by_signals()
    async with watch.running():
        while not await _is_set(leave, _LINE_S):
            found = {"time": round(time.time(), 1), **to_object(watch.hosts, watch.server, time.monotonic())}
            print(json.dumps(found), flush=True)
    return 0


async def _live(watch: Watch) -> int:
    leave, console = _leave_by_signals(), Console()
    loop = asyncio.get_running_loop()

    def read_keys() -> None:
        try:
            keys = os.read(0, 64)
        except OSError:  # the terminal is gone
            keys = b""
        if not keys or b"q" in keys.lower():
            loop.remove_reader(0)
            leave.set()

    async with watch.running():
        no_key = bytes([os.fpathconf(0, "PC_VDISABLE") & 0xFF])
        with changed_terminal(0, {termios.VSUSP: no_key}):  # a stopped view would leave the screen as it is
            tty.setcbreak(0, termios.TCSANOW)
            _keep_output_of_ctrl_c()
            loop.add_reader(0, read_keys)
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while not leave.is_set():
                    found = screen(watch.hosts, watch.server, time.monotonic(), console.size, _KEYS)
                    live.update(found, refresh=True)
                    await _is_set(leave, _REFRESH_S)
    return 0


def _keep_output_of_ctrl_c() -> None:
    """Have a Ctrl-C throw nothing away that waits to be shown.

    Linux empties the queue behind the signal, and wakes nobody who waits for room in it: a view that was being written
    would wait until the next key.
    """
    settings = termios.tcgetattr(0)
    settings[3] |= termios.NOFLSH
    termios.tcsetattr(0, termios.TCSANOW, settings)


def _leave_by_signals() -> asyncio.Event:
    leave, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, leave.set)
    return leave


async def _is_set(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for an event, but no longer; return whether it has come."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
    return event.is_set()

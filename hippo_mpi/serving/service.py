"""A server as a service of its account: a systemd user unit, or a launchd agent, which starts it again after a crash."""

from __future__ import annotations

import os
import platform
import plistlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hippo_mpi.durable_files import replacing
from hippo_mpi.errors import UserError, print_error

NAME = "hippo-serve"
_TIMEOUT_S = 60.0  # for systemctl and launchctl
_PASSED_ON = ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS", "PYTHONPATH")
"""What a service inherits of the environment in which it is installed; it has none of its own."""


@dataclass(frozen=True)
class Service:
    """What the system is told.

    Args:
        file: where it looks for services of this account.
        text: what stands in there.
        start: commands that start it, now and at each boot.
        stop: commands that end it.
        log: the command that shows what it says.
        folders: that must be there.
        stays: what is left of it when it is removed.
    """

    file: Path
    text: bytes
    start: Sequence[Sequence[str]]
    stop: Sequence[Sequence[str]]
    log: Sequence[str]
    folders: Sequence[Path]
    stays: str = "its journal and log are kept"


def service_of(words: Sequence[str], system: str = platform.system(), home: Path | None = None) -> Service:
    """Return the service that runs a server with these options, from this folder.

    Args:
        words: options of hippo_mpi.serve.
        system: Linux or Darwin.
        home: of the account; None: this one's.

    Raises:
        UserError: a word can't be written there.
    """
    home = Path.home() if home is None else home
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    told = [*words, os.getcwd(), *environment.values()]
    if any(ord(char) < 32 or "\ud800" <= char <= "\udfff" for word in told for char in word):
        raise UserError("options of a service, and its folder, can't have control characters, or others than UTF-8's")
    if os.getcwd().endswith(("\\", " ")):
        raise UserError("a service can't work in a folder whose name ends with a backslash or a space")
    command = [sys.executable, "-m", "hippo_mpi.serve", *words]
    is_mac = system == "Darwin"
    state = home / ("Library/Application Support" if is_mac else ".local/state") / NAME
    given = {word.partition("=")[0] for word in words}
    if not given & {"--journal", "--config"}:  # a file of options says by itself where
        command += ["--journal", str(state / "journal")]
    return (_launchd if is_mac else _systemd)(command, environment, home, state)


def _systemd(command: list[str], environment: dict[str, str], home: Path, state: Path) -> Service:
    file = home / ".config" / "systemd" / "user" / f"{NAME}.service"
    settings = "".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in environment.items())
    text = f"""\
[Unit]
Description=Hippo MPI's API
StartLimitIntervalSec=0

[Service]
WorkingDirectory={os.getcwd().replace("%", "%%")}
{settings}ExecStart={" ".join(_quoted(word).replace("$", "$$") for word in command)}
Restart=always
RestartSec=2
# The options are wrong, and would be the next time.
RestartPreventExitStatus=2
# The front ends its ranks itself; what is left after 20 s is killed.
KillMode=mixed
TimeoutStopSec=20

[Install]
WantedBy=default.target
"""
    systemctl = ("systemctl", "--user")
    return Service(
        file,
        text.encode(),
        # Lingering: it also runs while nobody is logged in.
        ((*systemctl, "daemon-reload"), (*systemctl, "enable", "--now", NAME), ("loginctl", "enable-linger")),
        ((*systemctl, "disable", "--now", NAME),),
        ("journalctl", "--user", "-u", NAME, "-f"),
        (file.parent, state),
        # Somebody else may have use for it by now.
        f"{Service.stays}, and so is lingering, which loginctl disable-linger ends",
    )


def _quoted(word: str) -> str:
    """Return a word as systemd reads it, in which a percent sign begins a specifier."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _launchd(command: list[str], environment: dict[str, str], home: Path, state: Path) -> Service:
    log = home / "Library" / "Logs" / f"{NAME}.log"
    file = home / "Library" / "LaunchAgents" / f"{NAME}.plist"
    agent = {
        "Label": NAME,
        "ProgramArguments": [*command, "--log-file", str(log)],
        "EnvironmentVariables": environment,
        "WorkingDirectory": os.getcwd(),
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 10,
        "ExitTimeOut": 20,
        "StandardErrorPath": str(log),  # of what is said before the log is opened
    }
    domain = f"gui/{os.getuid()}"
    return Service(
        file,
        plistlib.dumps(agent, sort_keys=False),
        (("launchctl", "bootstrap", domain, str(file)),),
        (("launchctl", "bootout", f"{domain}/{NAME}"),),
        ("tail", "-F", str(log)),
        (file.parent, state, log.parent),
    )


def install(service: Service) -> int:
    """Write a service's file and start it, once the one of before has ended; return the exit status.

    Raises:
        UserError: a file can't be written; the one of before goes on.
    """
    is_new = not service.file.exists()
    try:
        for folder in service.folders:
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(service.file) as stream:
            os.fchmod(stream.fileno(), 0o600)  # HF_ENDPOINT, for one, may have a password
            stream.write(service.text)
    except OSError as error:
        raise UserError(f"can't write {service.file}: {error.strerror}") from None
    print(f"wrote {service.file}")
    if not is_new:
        _run(service.stop)
    if why := _run(service.start):
        print_error(f"{why}; start it with: {' && '.join(map(shlex.join, service.start))}")
        return UserError.exit_code
    print(f"started, and will be at each boot; it says: {shlex.join(service.log)}")
    return 0


def uninstall(service: Service) -> int:
    """End a service and remove its file; says what stays. Returns the exit status."""
    if not service.file.exists():
        print(f"not installed: there is no {service.file}")
        return 0
    why = _run(service.stop)
    service.file.unlink()
    print(f"removed {service.file}; {service.stays}")
    if why:
        print_error(f"{why}; end it with: {' && '.join(map(shlex.join, service.stop))}")
        return UserError.exit_code
    return 0


def _run(commands: Sequence[Sequence[str]]) -> str:
    """Run commands, shown as they are run, until one fails; return why it did, or an empty text."""
    for command in commands:
        print(shlex.join(command), flush=True)
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S
            )
        except FileNotFoundError:
            return f"{command[0]} isn't installed"
        except subprocess.TimeoutExpired:
            return f"{command[0]} didn't end within {_TIMEOUT_S:.0f} s"
        if ended.returncode:
            lines = (ended.stderr or ended.stdout).strip().splitlines()
            return f"{command[0]}: {lines[-1] if lines else f'status {ended.returncode}'}"
    return ""

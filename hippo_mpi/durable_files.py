"""Files that outlive kills, power cuts and second writers: locked, replaced as a whole, and known to their folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hippo_mpi.errors import UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems over a network
_WHO = "process "  # how every lock begins


class FileLock:
    """The right to write a file, for as long as this process lives: a lock on FILE.lock, in which stands who has it.

    The file itself may be replaced meanwhile. After a kill FILE.lock stays, but locks nothing.

    Raises:
        UserError: another process has it, on this machine or over a network's file system, or FILE.lock is something else.
        OSError: FILE.lock can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}.lock")
        while True:
            self._descriptor = self._open()
            try:
                if not _is_lock(self._descriptor):
                    raise self._refusal()
                self._take(path)
                if self._is_the_one():
                    break
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)  # whoever had it has removed it since it was opened
        os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):  # on a full disk nobody learns who it is
            os.pwrite(self._descriptor, _who().encode(), 0)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise self._refusal() from None
            raise

    def _refusal(self) -> UserError:
        return UserError(f"{self._path} is no lock of ours: move it away, or give another file")

    def _take(self, path: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._descriptor, 1000, 0).decode(errors="replace") or "another process"
            raise UserError(
                f"{path} is being written by {owner}: wait for its end, or give another file"
                f" (if it is gone for good, remove {self._path})"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            sys.stderr.write(f"note: {path} can't be locked here ({error.strerror}): let nobody else write it\n")

    def _is_the_one(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        return False


def _is_lock(descriptor: int) -> bool:
    """True if the file has nothing in it but, perhaps, what a lock says: nobody's work is lost with it."""
    is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    return is_file and os.pread(descriptor, len(_WHO), 0) in (b"", _WHO.encode())


def _who() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{_WHO}{os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}, since {since}"


def create_beside(path: Path) -> tuple[int, Path]:
    """Create a file under a name that nothing else has, in the folder of `path`, and remove those that kills have left.

    Only who has the lock of `path` may do so. Returns an open descriptor, to append with, and the name.

    Raises:
        OSError: it can't be created.
    """
    left = re.compile(rf"{re.escape(path.name)}[.]new-[0-9a-f]{{16}}")
    for other in path.parent.iterdir():
        if left.fullmatch(other.name):
            other.unlink(missing_ok=True)
    new = path.with_name(f"{path.name}.new-{secrets.token_hex(8)}")
    return os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644), new


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place and the rights of `path` once it is whole and on disk. The lock of `path` must be had."""
    descriptor, temporary = create_beside(path)
    try:
        with open(descriptor, "wb") as stream:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
            yield stream
            stream.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def open_no_link(path: Path) -> int:
    """Open a file of ours to write in it, or create it.

    Raises:
        UserError: it is a link, which would lead to a file that isn't ours.
        OSError: it can't be written.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link: remove it") from None
        raise


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk: those of files that were made or renamed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_place(path: Path, option: str) -> None:
    """Raise a UserError if no file can be at a path that an option has given."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: give a file in it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.absolute().parent}")

"""Files that outlive kills, power cuts and second writers: locked, replaced as a whole, and known to their folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hippo_mpi.errors import UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems over a network


class FileLock:
    """The right to write a file, for as long as this process lives: a lock on FILE.lock, in which stands who has it.

    The file itself may be replaced meanwhile. After a kill FILE.lock stays, but locks nothing.

    Raises:
        UserError: another process has it, on this machine or over a network's file system.
        OSError: FILE.lock can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}.lock")
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
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


def _who() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}, since {since}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole and on disk."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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

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
_OWNER_PREFIX = "process "  # the beginning of every lock file's content


class FileLock:
    """The exclusive right to write a file while this process lives: a lock on FILE.lock, which says who holds it.

    The file itself may be replaced meanwhile. After a kill FILE.lock stays, but no longer locks anything.

    Raises:
        UserError: another process has it, on this machine or through a network file system; or FILE.lock isn't a lock
            file of ours.
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
                if self._is_current():
                    break
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)  # its previous owner removed the file after we had opened it
        os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its owner's name
            os.pwrite(self._descriptor, _who().encode(), 0)

    def release(self) -> None:
        """Give the lock up and remove FILE.lock."""
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
        return UserError(f"{self._path} is not a lock file of hippo_mpi: move it away, or give another file")

    def _take(self, path: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._descriptor, 1000, 0).decode(errors="replace") or "another process"
            raise UserError(
                f"{path} is being written by {owner}: wait until it ends, or give another file"
                f" (if that process no longer exists, remove {self._path})"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            sys.stderr.write(
                f"note: {path} can't be locked here ({error.strerror}): make sure that nothing else writes it\n"
            )

    def _is_current(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        return False


def _is_lock(descriptor: int) -> bool:
    """Return True if the file is empty or a lock file of ours, so that overwriting it loses nobody's data."""
    is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    return is_file and os.pread(descriptor, len(_OWNER_PREFIX), 0) in (b"", _OWNER_PREFIX.encode())


def _who() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{_OWNER_PREFIX}{os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}, since {since}"


def create_beside(path: Path) -> tuple[int, Path]:
    """Create a file with a unique name in the folder of `path`, and remove earlier ones that killed processes left.

    The caller must hold the lock of `path`.

    Returns:
        A descriptor that is open for appending, and the file's path.

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
    """Yield a file that replaces `path`, with the same permissions, once it is complete and on disk.

    The caller must hold the lock of `path`. If the block raises, `path` stays as it was.

    Raises:
        OSError: it can't be written.
    """
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
    """Open a file of ours for writing, without truncating it; create it if it is missing.

    Returns:
        Its descriptor.

    Raises:
        UserError: it is a symbolic link, and might lead to a file that isn't ours.
        OSError: it can't be written.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a symbolic link: remove it") from None
        raise


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that files that were created or renamed in it keep their names after a power cut.

    Raises:
        OSError: it can't be opened or synced.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_place(path: Path, option: str) -> None:
    """Check that a file can be at a path that an option has given.

    Raises:
        UserError: it is a folder, or its folder doesn't exist.
    """
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: give a file in it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: no such folder: {path.absolute().parent}")

"""Keeps a model's files on its host: python -m hippo_mpi.cluster.sync.place, by ssh, for sync on another machine.

Frames on standard input ask, frames on standard output answer, and the end of the input is the end. Only to lend to
other hosts a port is opened (see `direct`). No file is half there: small files and the heads of weight files are
collected in a folder of their own, which becomes the view as a whole; what comes then is written into the view's
stand-ins, and recorded once it is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hippo_mpi.cluster.sync.direct import (
    Borrower,
    Lender,
    LinkError,
    NotLentError,
    addresses_beside,
    read_addresses,
)
from hippo_mpi.cluster.sync.frames import MARK, Data, FrameError, Frames, Header
from hippo_mpi.cluster.sync.model_files import ModelFiles, check_name
from hippo_mpi.cluster.sync.whole_files import digest_of_whole, replace_by_stand_in
from hippo_mpi.durable_files import sync_folder
from hippo_mpi.errors import UserError, printable
from hippo_mpi.views.spans import (
    Span,
    forget,
    forget_damaged,
    num_bytes,
    read_span,
    recorded,
    spans_here,
    without,
    write_here,
)
from hippo_mpi.views.view import (
    LAYOUT,
    NOTE,
    STAGED,
    content_here,
    is_usable,
    is_view,
    note_of,
    put_view,
    remove_view,
    views_folder,
)

_SILENCE_S = 600.0  # without a word, after which whoever asks counts as gone
_TOLD_EVERY_S = 1.0
_RECORDS = (".spans", ".sums", ".lock")  # beside a stand-in


class Place:
    """One model on this host.

    Args:
        frames: to whoever asks.
        model: which.

    Raises:
        UserError: another model is at its path.
    """

    def __init__(self, frames: Frames, model: ModelFiles) -> None:
        self._frames, self._model = frames, model
        self.folder = model.folder()
        has_all = all((self.folder / name).exists() for name in model.sizes)
        if self.folder.parent == views_folder() and is_view(self.folder) and not (has_all and is_usable(self.folder)):
            remove_view(self.folder)
        self._staged: Path | None = None
        self._lock = -1
        self._told_s, self._done = time.monotonic(), 0
        self._borrower = Borrower(self._tell)

    def answer(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Do what is asked; return the answer.

        Raises:
            UserError, OSError: it can't be done.
        """
        asked: dict[str, Callable[[Header, Data], tuple[Header, Data]]] = {
            "open": self._open, "stage": self._stage, "commit": self._commit, "put": self._put, "get": self._get,
            "verify": self._verify, "lend": self._lend, "borrow": self._borrow, "link": self._link,
            "compare": self._compare,
        }  # fmt: skip
        if header.get("op") not in asked:
            raise UserError(f"{str(header.get('op'))[:100]!a} is nothing that can be asked")
        try:
            return asked[header["op"]](header, data)
        except OSError:
            self.drop_staged()  # a full disk, for one, has use for the room
            raise

    def _open(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Say what is here; nothing is changed."""
        place = self.folder
        while not place.is_dir():
            place = place.parent
        small = {} if self._is_kept else self._small_files(header.get("small", ()))
        return {
            "here": self._here(), "free": shutil.disk_usage(place).free, "small": small,
            "folder": str(self.folder), "is_kept": self._is_kept, "is_made": is_view(self.folder),
        }, b""  # fmt: skip

    @property
    def _is_kept(self) -> bool:
        """True if a folder that isn't ours has everything."""
        return self.folder.parent != views_folder() and self.folder.is_dir() and not is_view(self.folder)

    def _here(self) -> dict[str, list[Span]]:
        """Return which bytes are here: of a view that isn't made yet, files in the hub's cache, which it will link to."""
        if self._is_kept or is_view(self.folder):
            return content_here(self.folder, self._model.sizes)
        return content_here(self._snapshot, self._model.sizes) if self._model.repo else {}

    def _small_files(self, names: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of those that are here, and of no others: beside them a cache may have files of any size."""
        folder = self._snapshot if self._model.repo else self.folder
        paths = [folder / check_name(name) for name in names if name not in self._model.sizes]
        return {path.name: digest_of_whole(path, path.stat().st_size, self._tell) for path in paths if path.is_file()}

    @property
    def _snapshot(self) -> Path:
        """The folder in which the hub's own library looks for a repo's files."""
        from huggingface_hub import constants  # which reads the environment when it is imported

        folder = f"models--{self._model.repo.replace('/', '--')}"
        return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / self._model.commit

    def _stage(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Keep a part of a small file, or of a weight file's head, until `commit`."""
        name, start = check_name(header["name"]), int(header["start"])
        path = self._staging() / name
        if name not in self._model.sizes:
            with path.open("r+b" if start else "wb") as stream:
                stream.seek(start)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        else:
            if not path.exists():
                with path.open("wb") as stream:
                    stream.truncate(self._model.sizes[name])
            write_here(path, start, data)
        return {}, b""

    def _staging(self) -> Path:
        """Return the folder for what isn't committed yet; earlier ones, of killed processes, are removed."""
        if self._staged is None:
            views = views_folder()
            views.mkdir(parents=True, exist_ok=True)
            for left in views.glob(f"{STAGED}*"):
                with contextlib.suppress(OSError):
                    descriptor = os.open(left / ".lock", os.O_RDWR | os.O_CREAT)
                    with contextlib.closing(os.fdopen(descriptor)):
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(left)
            self._staged = Path(tempfile.mkdtemp(prefix=STAGED, dir=views))
            self._lock = os.open(self._staged / ".lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self._staged

    def _commit(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Make the view of what was staged, or renew what was staged of it."""
        staged = self._staging()
        try:
            if self._model.repo:
                self._commit_snapshot(staged)
            if not is_view(self.folder):
                self._make_view(staged)
            else:
                for path in staged.iterdir():
                    if path.name != ".lock":
                        os.replace(path, self.folder / path.name)
                if not self._model.repo:
                    self._write_note(self.folder)
            sync_folder(views_folder())
        finally:
            self.drop_staged()
        return {}, b""

    def drop_staged(self) -> None:
        """Remove what isn't committed."""
        if self._staged is not None:
            shutil.rmtree(self._staged, ignore_errors=True)
            os.close(self._lock)
            self._staged = None

    def _make_view(self, staged: Path) -> None:
        for name in self._model.sizes if self._model.repo else ():
            if name in self._here():
                (staged / name).unlink(missing_ok=True)
                (staged / name).symlink_to((self._snapshot / name).resolve())
        self._write_note(staged)
        (staged / ".lock").unlink()
        put_view(staged, self.folder)

    def _commit_snapshot(self, staged: Path) -> None:
        """Give the hub's own library what it needs to find the repo without the hub."""
        self._snapshot.mkdir(parents=True, exist_ok=True)
        for path in staged.iterdir():
            if path.name not in self._model.sizes and not path.name.endswith(_RECORDS):
                temporary = self._snapshot / f"{path.name}.{os.getpid()}"
                shutil.copyfile(path, temporary)  # its cache may be on another disk
                os.replace(temporary, self._snapshot / path.name)
                path.unlink()
        if self._model.revision != self._model.commit:
            ref = self._snapshot.parents[1] / "refs" / self._model.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            temporary = ref.with_name(f"{ref.name}.{os.getpid()}")
            temporary.write_text(self._model.commit)
            os.replace(temporary, ref)

    def _write_note(self, folder: Path) -> None:
        model = self._model
        note: dict[str, Any] = {"commit": model.commit, "layout": LAYOUT}
        if model.repo:
            note["repo"] = model.repo
        else:
            known = note_of(folder).get("models", ())
            note |= {"origin": model.origin, "models": sorted({*known, model.model})}
            self._remove_older()
        temporary = folder / f"{NOTE}.{os.getpid()}"
        temporary.write_text(json.dumps(note))
        os.replace(temporary, folder / NOTE)

    def _remove_older(self) -> None:
        """Remove the views of what was in the same folder before."""
        for path in views_folder().glob(f"local--*/{NOTE}"):
            with contextlib.suppress(OSError):
                if path.parent != self.folder and note_of(path.parent).get("origin") == self._model.origin:
                    remove_view(path.parent)

    def _put(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Write a piece into its stand-in, if it arrived as it was sent."""
        name, start = check_name(header["name"]), int(header["start"])
        return {"is_good": self._keep(name, (start, start + len(data)), data, header["digest"])}, b""

    def _keep(self, name: str, span: Span, data: Data, digest: str) -> bool:
        """Write a piece, and return True, if it arrived as it was sent."""
        if not 0 <= span[0] <= span[1] <= self._model.sizes.get(name, 0):
            raise UserError(f"bytes {span[0]:,} to {span[1]:,} aren't in {name}")
        if len(data) != span[1] - span[0] or hashlib.sha256(data).hexdigest() != digest:
            return False
        file = self.folder / name
        if not file.is_symlink():  # else a rank has fetched all of it meanwhile
            write_here(file, span[0], data, digest)
        return True

    def _get(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Return a piece, if it is still as it arrived."""
        span = int(header["start"]), int(header["stop"])
        piece, digest = read_good(self.folder, check_name(header["name"]), span)
        return {"digest": digest}, piece

    def _lend(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Lend to other hosts from now on; return the addresses, their ports, and whose networks they are in."""
        lender = Lender(bytes.fromhex(header["key"]), lambda name, span: read_good(self.folder, name, span))
        lends = []
        for address, beside in addresses_beside(header["own"], header["others"]).items():
            with contextlib.suppress(OSError):  # it isn't this host's
                lends.append([address, lender.listen(address), beside])
        return {"lends": lends}, b""

    def _borrow(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Get a piece from another host, and write it as if it had been sent; or say why the link doesn't bring it."""
        name, span = check_name(header["name"]), (int(header["start"]), int(header["stop"]))
        key, lender = bytes.fromhex(header["key"]), read_addresses(header["from"])
        try:
            piece, digest = self._borrower.borrow(lender, key, name, span)
        except LinkError as error:
            return {"is_good": False, "link": str(error)}, b""
        except NotLentError as error:
            return {"is_good": False, "not_lent": str(error)}, b""
        return {"is_good": self._keep(name, span, piece, digest)}, b""

    def _compare(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Look whether whole files have these SHA-256; those that haven't count as not here from now on."""
        bad, checked = [], 0
        for name, digest in header["sums"].items():
            file, size = self.folder / check_name(name), self._model.sizes[name]
            checked += size if file.is_symlink() else num_bytes(without([(0, size)], recorded(file)))
            if digest_of_whole(file, size, self._tell) == digest:
                continue
            bad.append(name)
            forget(file, [(0, size)])  # of a link's, what is left of the stand-in before it
            if file.is_symlink():  # the hub's cache is others', too
                replace_by_stand_in(file, size)
        return {"bad": bad, "checked": checked}, b""

    def _link(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Let the path at which ranks open an adapter lead to what is here."""
        if not self._is_kept:
            path = Path(os.path.abspath(os.path.expanduser(self._model.link)))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                temporary.symlink_to(self.folder)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return {}, b""

    def _tell(self) -> None:
        """Say now and then that it goes on, and how many steps it has done: pieces that were read, for one."""
        self._done += 1
        if time.monotonic() > self._told_s + _TOLD_EVERY_S:
            self._told_s = time.monotonic()
            self._frames.send({"goes_on": self._done})

    def _verify(self, header: Header, data: Data) -> tuple[Header, Data]:
        """Look whether everything is still as it arrived; what isn't counts as not here from now on."""
        bad, unchecked = 0, 0
        for name, spans in self._here().items():
            file = self.folder / name
            if self._is_kept or not file.exists() or file.is_symlink():
                unchecked += num_bytes(spans)
                continue
            unchecked += num_bytes(without(spans_here(file), recorded(file)))
            bad += num_bytes(forget_damaged(file, on_progress=lambda count: self._tell()))
        return {"bad": bad, "unchecked": unchecked}, b""


def read_good(folder: Path, name: str, span: Span) -> tuple[bytearray, str]:
    """Return bytes of a model's file that are here, and as they arrived, and their SHA-256.

    Raises:
        UserError: they aren't.
        OSError: they can't be read.
    """
    file = folder / name
    arrived = ""
    if is_view(folder) and not file.is_symlink():
        arrived = recorded(file).get(span, "")
        if not arrived and (forget_damaged(file, span) or without([span], spans_here(file))):
            raise UserError(f"{name} is damaged there")
    data = read_span(file, span)
    digest = hashlib.sha256(data).hexdigest()
    if arrived and digest != arrived:
        forget(file, [span])
        raise UserError(f"{name} is damaged there")
    return data, digest


def told(error: Exception, folder: Path) -> str:
    """Return what went wrong, for a line to the user."""
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk with {folder} is full"
        return f"{error.strerror or error}: {error.filename or folder}"
    return str(error)


def main() -> None:
    """Answer until the input ends; ends the process."""
    frames, folder = Frames(0, os.dup(1), _SILENCE_S), Path()
    os.dup2(2, 1)  # whatever a library prints is no frame
    place: Place | None = None
    try:
        frames.write(MARK)
        errand, _ = frames.receive()
        os.environ.update(errand["environment"])
        with contextlib.suppress(OSError):
            os.chdir(errand["folder"])
        while True:
            header, data = frames.receive()
            try:
                if place is None:
                    place = Place(frames, ModelFiles.from_object(errand["model"]))
                    folder = place.folder
                answer, piece = place.answer(header, data)
            except (UserError, OSError, KeyError, ValueError, TypeError) as error:
                answer, piece = {"error": printable(told(error, folder))}, b""
            frames.send(answer, piece)
    except FrameError:
        if place:
            place.drop_staged()


if __name__ == "__main__":
    main()

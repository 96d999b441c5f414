"""What sync moves, how it speaks, and what it leaves behind when it is killed; all in one process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hippo_mpi.checkpoint import hub
from hippo_mpi.cluster.hostfile import hostfile_of
from hippo_mpi.cluster.sync.frames import MARK, PIECE_BYTES, FrameError, Frames
from hippo_mpi.cluster.sync.model_files import ModelFiles, check_name, read_spans
from hippo_mpi.cluster.sync.needs import Needs
from hippo_mpi.cluster.sync.pieces import missing, pieces_to_move
from hippo_mpi.cluster.sync.place import Place, told
from hippo_mpi.cluster.sync.session import state_of
from hippo_mpi.cluster.verbs.sync import Options, _questions, ranks_by_host
from hippo_mpi.config.bundled import BUNDLED_NAMES
from hippo_mpi.errors import ModelError, UserError
from hippo_mpi.units import visible
from hippo_mpi.views.spans import Span, merged, num_bytes, recorded, spans_here
from hippo_mpi.views.view import (
    NOTE,
    commit_of,
    is_usable,
    is_view,
    note_of,
    put_view,
    sample_of_files,
    synced_view,
    views_folder,
)
from tests.small_disk import fill as fill_disk
from tests.small_disk import small_disk

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=5).map(merged)
CONTENTS = st.lists(st.dictionaries(st.sampled_from(["a", "b"]), SPANS), min_size=3, max_size=3)
SIZE = 4000
NAME = "model.safetensors"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, as of another host."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home"


# ---- what goes where


@settings(deadline=None)
@given(CONTENTS, CONTENTS, st.integers(1, 9))
def test_every_lacking_byte_is_in_one_piece_for_all_who_lack_it(
    needs: list[dict[str, list[Span]]], here: list[dict[str, list[Span]]], most: int
) -> None:
    lacks = [missing(one, other) for one, other in zip(needs, here, strict=True)]
    moved: dict[tuple[str, int], tuple[int, ...]] = {}
    for piece in pieces_to_move(lacks, here, most):
        assert 0 < piece.num_bytes <= most
        for byte in range(piece.start, piece.stop):
            assert (piece.name, byte) not in moved
            moved[piece.name, byte] = piece.goal
            for number, content in enumerate(here):
                held = any(start <= byte < stop for start, stop in content.get(piece.name, ()))
                assert held == (number in piece.holders) and not (held and number in piece.goal)
    for number, content in enumerate(lacks):
        bytes_of = {(name, byte) for name, spans in content.items() for span in spans for byte in range(*span)}
        assert bytes_of == {place for place, goal in moved.items() if number in goal}


def test_a_host_that_is_named_twice_needs_what_both_of_its_ranks_need() -> None:
    hostfile = hostfile_of([{"ssh": "a", "rdma": [["x", "y"]]}, {"ssh": "b"}, {"ssh": "a"}], "hosts")
    ranks = ranks_by_host(hostfile)
    assert [(host.ssh, some) for host, some in ranks] == [("a", [0, 2]), ("b", [1])]
    needs = Needs(
        MODEL, Path("/x/story"), {NAME: 10}, [], [1, 1, 1], [{NAME: [(0, 10), (50 * n, 50 * n + 60)]} for n in range(3)]
    )
    assert state_of(*ranks[0], needs).lacks == {NAME: [(0, 60), (100, 160)]}


def test_the_draft_is_rank_0s_alone_and_the_adapter_everybodys() -> None:
    hostfile = hostfile_of([{"ssh": "a"}, {"ssh": "b"}], "hosts")
    options = Options(model="m", adapter_path="x", draft_model="org/small", layer_split=(1, 2), trust_remote_code=True)
    model, adapter, draft = _questions(options, hostfile)
    assert [(what, [host.ssh for host in some.hosts]) for what, some, _ in (model, adapter, draft)] == [
        ("model", ["a", "b"]), ("adapter", ["a", "b"]), ("draft", ["a"])
    ]  # fmt: skip
    assert not model[2]["whole"] and adapter[2]["whole"] and adapter[2]["is_adapter"] and draft[2]["whole"]
    assert [one[2]["model"] for one in (model, adapter, draft)] == ["m", "x", "org/small"]
    bundled = Options(model="m", draft_model=BUNDLED_NAMES[0])
    assert [what for what, *_ in _questions(bundled, hostfile)] == ["model"]


# ---- frames


@contextlib.contextmanager
def connected(silence_s: float = 5.0) -> Iterator[tuple[Frames, Frames]]:
    there, here = os.pipe(), os.pipe()
    try:
        yield Frames(there[0], here[1], silence_s), Frames(here[0], there[1], silence_s)
    finally:
        for descriptor in (*there, *here):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def test_frames_arrive_as_they_were_sent_behind_a_greeting() -> None:
    data = os.urandom(3 << 20)
    with connected() as (one, other):

        def send() -> None:
            one.write(b"Welcome to mini2\n" + MARK)
            one.send({"name": "x"}, data)
            one.send({})

        sending = threading.Thread(target=send)
        sending.start()
        other.await_mark()
        assert other.receive() == ({"name": "x"}, data)
        assert other.receive() == ({}, b"")
        sending.join()


@pytest.mark.parametrize(
    "sent", [b"\xff" * 8, (1).to_bytes(4, "big") + (PIECE_BYTES + 1).to_bytes(4, "big"), bytes([0, 0, 0, 2, 0, 0, 0, 0]) + b"[]",
             bytes([0, 0, 0, 2, 0, 0, 0, 0]) + b"{{", bytes([0, 1, 0, 0, 0, 0, 0, 0]) + b"[" * 65536]
)  # fmt: skip
def test_what_is_no_frame(sent: bytes) -> None:
    with connected() as (one, other):
        one.write(sent)
        with pytest.raises(FrameError, match="a frame"):
            other.receive()


def test_silence_and_the_end_are_noticed() -> None:
    with connected(0.05) as (one, other):
        with pytest.raises(FrameError, match="nothing moved"):
            other.receive()
        with pytest.raises(FrameError, match="nothing moved"):
            one.write(bytes(8 << 20))
    with pytest.raises(FrameError, match="ended"):
        other.receive()


def test_a_greeting_that_never_ends_is_given_up() -> None:
    with connected(0.3) as (one, other):
        over = threading.Event()

        def drip() -> None:
            while not over.wait(0.02):
                one.write(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            with pytest.raises(FrameError, match="prints without end"):
                other.await_mark()
        finally:
            over.set()
            dripping.join()


# ---- what comes off the network


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "/etc/passwd", ".ssh", "-rf", "a\nb", "a\x1b[2J", "x" * 201, 5, None]
)
def test_names_that_are_no_names_of_files(name: Any) -> None:
    with pytest.raises(UserError, match="is no name of a model's file"):
        check_name(name)


MODEL = ModelFiles("/x/story", "ab" * 32, {NAME: SIZE}, origin="/x/story")


@pytest.mark.parametrize(
    "change", [{"sizes": {"../x": 1}}, {"sizes": {NAME: -1}}, {"sizes": {NAME: 1.5}}, {"commit": "../x"}, {"repo": "a/../b"},
               {"repo": "a/b", "revision": "../../x"}, {"repo": "a/b", "revision": "/etc"}, {"repo": "a/..", "revision": "main"}]
)  # fmt: skip
def test_models_that_lead_elsewhere(change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ModelFiles.from_object({**MODEL.as_object(), **change})


@pytest.mark.parametrize("spans", [[[0, SIZE + 1]], [[-1, 5]], [[1]], [["0", "1"]], 5, [[0, 2.5]], [None]])
def test_spans_that_are_in_no_file(spans: Any) -> None:
    with pytest.raises(UserError, match="spans"):
        read_spans({NAME: spans}, {NAME: SIZE})


def test_a_terminal_obeys_nothing_of_another_host() -> None:
    assert visible("\x1b[2J\x07evil\r\n" + "x" * 1000, 19) == r"\x1b[2J\x07evil\r\n..."


# ---- on the other host


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


DATA = b"".join(number.to_bytes(4, "big") for number in range(SIZE // 4))


def ask(model: ModelFiles, op: str, data: bytes = b"", **header: Any) -> dict[str, Any]:
    """What a new program there answers."""
    return Place(None, model).answer({"op": op, **header}, data)[0]  # type: ignore[arg-type]


def fill(place: Place, step: int = 500, head: int = 100) -> None:
    """All that a sync does, as often as it is called."""
    opened = place.answer({"op": "open"}, b"")[0]
    if not opened["is_made"]:
        place.answer({"op": "stage", "name": NAME, "start": 0}, DATA[:head])
    if opened["small"].get("config.json") != digest(b"{}"):
        place.answer({"op": "stage", "name": "config.json", "start": 0}, b"{}")
    place.answer({"op": "commit"}, b"")
    here = place.answer({"op": "open"}, b"")[0]["here"]
    for piece in pieces_to_move([missing({NAME: [(0, SIZE)]}, here)], [here], step):
        data = DATA[piece.start : piece.stop]
        place.answer({"op": "put", "name": NAME, "start": piece.start, "digest": digest(data)}, data)


def new_place(model: ModelFiles = MODEL) -> Place:
    return Place(None, model)  # type: ignore[arg-type]


@pytest.mark.parametrize("repo", ["", "someone/story"])
def test_a_view_is_there_as_a_whole_or_not_at_all(repo: str, home: Path) -> None:
    model = replace(MODEL, repo=repo, revision="main", commit="ab" * 20) if repo else MODEL
    place = new_place(model)
    opened = place.answer({"op": "open"}, b"")[0]
    assert (opened["here"], opened["small"], opened["is_made"]) == ({}, {}, False) and not home.exists()
    place.answer({"op": "stage", "name": NAME, "start": 0}, DATA[:100])
    assert not place.folder.exists()
    new = new_place(model)
    fill(new)
    assert (new.folder / NAME).read_bytes() == DATA and spans_here(new.folder / NAME) == [(0, SIZE)]
    assert note_of(new.folder)["commit"] == model.commit
    if repo:
        snapshots = home / "hub" / "models--someone--story"
        assert (snapshots / "refs" / "main").read_text() == model.commit
        assert (snapshots / "snapshots" / model.commit / "config.json").read_text() == "{}"
    else:
        assert (new.folder / "config.json").read_text() == "{}"


class Kill(BaseException):
    """Nothing of the program runs any more."""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moments=st.lists(st.integers(0, 60), max_size=4), half=st.booleans())
def test_kills_at_any_moment_cost_one_piece_and_leave_nothing_half_written(
    moments: list[int], half: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At any call that changes a disk; also after half of a write. What is recorded is there, always."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setattr(constants, "HF_HOME", str(home))
        folder = new_place().folder
        for moment in moments:
            before = num_bytes(spans_here(folder / NAME))
            place = new_place()
            with pytest.MonkeyPatch.context() as killing, contextlib.suppress(Kill):
                sent = kill_at(killing, moment, half)
                fill(place)
            if place._staged:
                os.close(place._lock)
            now = num_bytes(spans_here(folder / NAME))
            assert sum(sent) - (now - before) <= 500 + 100  # one piece, or the head
            if is_view(folder):
                assert (folder / "config.json").read_text() == "{}"
                assert all(
                    (folder / NAME).read_bytes()[slice(*span)] == DATA[slice(*span)]
                    for span in spans_here(folder / NAME)
                )
            else:
                assert not folder.exists()
            assert all(digest(DATA[slice(*span)]) == found for span, found in recorded(folder / NAME).items())
        fill(new_place())
        assert (folder / NAME).read_bytes() == DATA and ask(MODEL, "verify") == {"bad": 0, "unchecked": 0}
        assert [path.name for path in views_folder().iterdir()] == [folder.name]


def kill_at(patch: pytest.MonkeyPatch, moment: int, half: bool) -> list[int]:
    """Let the call with this number be the last one; returns the sizes of writes, as they come."""
    left, sent, unsynced = [moment], list[int](), [False]

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            if left[0] == 0:
                if name == "pwrite" and half:
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                raise Kill
            left[0] -= 1
            if name == "pwrite":
                sent.append(len(args[1]))
            unsynced[0] = name == "pwrite" or (unsynced[0] and name != "fsync")
            assert not (unsynced[0] and str(args[-1]).endswith(".spans")), "recorded before it is on the disk"
            return real(*args)

        patch.setattr(os, name, call)

    for name in ("pwrite", "fsync", "replace", "rename"):
        wrap(name)
    return sent


def test_a_byte_that_flips_on_the_wire_is_not_kept(home: Path) -> None:
    fill(place := new_place(replace(MODEL, sizes={NAME: SIZE})))
    (place.folder / f"{NAME}.spans").write_text("[]")
    wrong = bytearray(DATA[:500])
    wrong[7] ^= 1
    said = ask(MODEL, "put", bytes(wrong), name=NAME, start=0, digest=digest(DATA[:500]))
    assert said == {"is_good": False} and spans_here(place.folder / NAME) == []


def test_a_byte_that_flips_on_the_disk_is_found_and_its_piece_fetched_again(home: Path) -> None:
    fill(place := new_place())
    file = place.folder / NAME
    with file.open("r+b") as stream:
        stream.seek(1234)
        stream.write(bytes([DATA[1234] ^ 4]))
    with pytest.raises(UserError, match="damaged"):
        ask(MODEL, "get", name=NAME, start=1200, stop=1300)
    assert num_bytes(spans_here(file)) == SIZE - 500 and ask(MODEL, "verify") == {"bad": 0, "unchecked": 0}
    fill(new_place())
    assert file.read_bytes() == DATA and spans_here(file) == [(0, SIZE)]


def test_a_disk_that_is_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays; with room, it goes on."""
    with small_disk(tmp_path / "disk") as disk:
        monkeypatch.setattr(constants, "HF_HOME", str(disk))
        place = new_place()
        place.answer({"op": "stage", "name": NAME, "start": 0}, DATA[:100])
        place.answer({"op": "commit"}, b"")
        filler = fill_disk(disk)
        with pytest.raises(OSError, match="No space") as error:
            fill(place)
        assert told(error.value, place.folder) == f"the disk with {place.folder} is full"
        assert spans_here(place.folder / NAME) == [(0, 100)]
        filler.unlink()
        fill(new_place())
        assert (place.folder / NAME).read_bytes() == DATA
        assert [path.name for path in views_folder().iterdir()] == [place.folder.name]


def test_what_is_asked_wrongly_is_refused(home: Path) -> None:
    fill(new_place())
    for op, header in (
        ("put", {"name": NAME, "start": SIZE - 1, "digest": digest(b"ab")}), ("put", {"name": "other", "start": 0, "digest": ""}),
        ("get", {"name": NAME, "start": 0, "stop": SIZE + 1}), ("stage", {"name": "../evil", "start": 0}), ("run", {}),
    ):  # fmt: skip
        with pytest.raises(UserError):
            ask(MODEL, op, b"ab", **header)


def test_a_folder_of_its_own_at_the_path(home: Path, tmp_path: Path) -> None:
    """The same model: nothing to do; another: it is left alone."""
    (tmp_path / "story").mkdir()
    (tmp_path / "story" / NAME).write_bytes(DATA)
    model = replace(MODEL, model=str(tmp_path / "story"), commit=sample_of_files(tmp_path / "story"))
    assert ask(model, "open")["here"] == {NAME: [(0, SIZE)]} and ask(model, "open")["is_kept"]
    (tmp_path / "story" / NAME).write_bytes(DATA[::-1])
    with pytest.raises(UserError, match="another model than here"):
        new_place(model)


def test_files_in_the_hubs_cache_are_not_fetched_again(home: Path) -> None:
    model = replace(MODEL, repo="someone/story", revision="main", commit="ab" * 20)
    snapshot = home / "hub" / "models--someone--story" / "snapshots" / model.commit
    snapshot.mkdir(parents=True)
    (snapshot / NAME).write_bytes(DATA)
    assert ask(model, "open")["here"] == {NAME: [(0, SIZE)]}
    fill(place := new_place(model))
    assert (place.folder / NAME).is_symlink() and (place.folder / NAME).read_bytes() == DATA


def test_a_folder_that_has_changed_replaces_what_it_was(home: Path) -> None:
    fill(old := new_place())
    fill(new := new_place(replace(MODEL, commit="cd" * 32)))
    assert new.folder != old.folder and not old.folder.exists() and is_view(new.folder)
    assert json.loads((new.folder / ".hippo-hub.json").read_text())["models"] == [MODEL.model]


def test_of_a_cache_only_the_small_files_that_are_asked_for_are_read(home: Path) -> None:
    model = replace(MODEL, repo="someone/story", revision="main", commit="ab" * 20)
    snapshot = home / "hub" / "models--someone--story" / "snapshots" / model.commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with (snapshot / "consolidated.safetensors").open("wb") as stream:
        stream.truncate(1 << 40)
    names = ["config.json", "tokenizer.json", NAME]
    assert ask(model, "open", small=names)["small"] == {"config.json": digest(b"{}")}
    with pytest.raises(UserError, match="no name"):
        ask(model, "open", small=["../../refs/main"])


def test_what_a_kill_has_left_of_a_view_gives_way(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(old := new_place())
    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr("shutil.rmtree", lambda *words, **named: kill())
        (old.folder / NAME).unlink()
        new_place()
    assert not old.folder.exists()
    fill(new := new_place())
    (new.folder / NOTE).unlink()  # as by a rank, whose removal a kill has ended
    fill(again := new_place())
    assert again.folder == old.folder and (again.folder / NAME).read_bytes() == DATA
    assert [path.name for path in views_folder().iterdir()] == [old.folder.name]


def test_what_a_kill_has_left_of_a_rank_s_view_gives_way(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = home / "hub" / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr(hub, "_weight_files", lambda *_: [NAME])
    monkeypatch.setattr(hub, "_make_weight_file", lambda path, *_: path.write_bytes(b"new"))
    view = hub.open_repo("a/b", None, lambda: None)
    (view / NOTE).unlink()  # the removal of one that was unusable was ended after this
    assert hub.open_repo("a/b", None, lambda: None) == view and (view / NAME).read_bytes() == b"new"
    (view / NOTE).write_text("{}")
    (view / NAME).write_bytes(b"old")
    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr("shutil.rmtree", lambda *words, **named: kill())
        hub.open_repo("a/b", None, lambda: None)
    assert not view.exists()
    assert hub.open_repo("a/b", None, lambda: None) == view and (view / NAME).read_bytes() == b"new"


def test_of_ranks_that_make_a_view_at_once_one_is_first(home: Path) -> None:
    made = [views_folder() / f"made{number}" for number in range(8)]
    view = views_folder() / "a--b--0"
    view.mkdir(parents=True)
    (view / "left").touch()
    for number, folder in enumerate(made):
        folder.mkdir()
        (folder / NOTE).write_text(json.dumps({"layout": number}))
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda folder: [put_view(folder, view), note_of(view)["layout"]][1], made))
    assert len({*seen}) == 1 and not (view / "left").exists()


@pytest.mark.parametrize("note", ["[1]", "5", "null", "{", "[" * 100_000, '{"models": 5}', '{"layout": [2]}'])
def test_a_note_that_says_something_else_is_none(note: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(place := new_place())
    (place.folder / NOTE).write_text(note)
    assert is_view(place.folder) and not is_usable(place.folder)
    assert (commit_of(place.folder), synced_view(MODEL.model)) == (None, None)
    monkeypatch.setattr(hub, "spans_of", lambda *_: [(0, SIZE + 1)])
    with pytest.raises(ModelError, match="aren't on this host"):
        hub.fetch(place.folder, {NAME: ["w"]}, lambda: None)
    fill(again := new_place())
    assert is_usable(again.folder) and synced_view(MODEL.model) == again.folder


@pytest.mark.parametrize("spans", ["[[0, 1e400]]", "[" * 100_000, "[[0, NaN]]", "{}", "[[1]]"])
def test_spans_that_can_not_be_read_are_none(spans: str, home: Path) -> None:
    fill(place := new_place())
    (place.folder / f"{NAME}.spans").write_text(spans)
    assert spans_here(place.folder / NAME) == [] and recorded(place.folder / NAME) == {}


def kill() -> None:
    raise Kill


def test_at_an_adapter_s_path_nothing_of_others_is_replaced(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link whose disk is away just now, one that leads to itself, and a folder that came meanwhile."""
    path = tmp_path / "adapters" / "mine"
    model = replace(MODEL, model=str(path), link=str(path))
    fill(place := new_place(model))
    path.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        place.answer({"op": "link"}, b"")
    path.rmdir()
    assert list(path.parent.iterdir()) == []
    for goal in (tmp_path / "disk" / "mine", path):
        path.symlink_to(goal)
        with pytest.raises(UserError, match="another adapter than here"):
            new_place(model)
        path.unlink()
    place.answer({"op": "link"}, b"")
    assert path.resolve() == place.folder

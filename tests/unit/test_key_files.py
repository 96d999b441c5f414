"""Keys: what a file and the environment may hold, and who is let in by them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from hippo_mpi.config.serve_options import API_KEYS, ServeOptions
from hippo_mpi.errors import FieldError, UserError
from hippo_mpi.serve import read_rules
from hippo_mpi.serving.api.access import Access, AccessRules, Rate
from hippo_mpi.serving.key_files import keys_of_environment, read_key_file


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_a_file_of_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "keys", "# production keys\n\n  sk-0123456789  \r\n\tsk-#2\n   # sk-old\nsk,3\n")
    assert read_key_file(path, "--api-key-file") == ("sk-0123456789", "sk-#2", "sk,3")
    assert not caplog.messages
    path.chmod(0o644)
    read_key_file(path, "--api-key-file")
    assert caplog.messages == [f"other users may read the keys in {path}: chmod 600 {path}"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "contains no key"),
        ("\n \n# sk-1\n", "contains no key"),
        ("sk-1\n\nsk-2 alice\n", ", line 3: a key can't contain spaces"),
        ("sk-1\tname\n", ", line 1: a key can't contain spaces"),
        ("\ufeffsk-1\n", ", line 1: a key must consist of printable ASCII characters"),
        ("sk-ü\n", ", line 1: a key must consist of printable ASCII characters"),
    ],
)
def test_a_file_that_holds_no_keys(tmp_path: Path, text: str, line: str) -> None:
    path = write(tmp_path / "keys", text)
    with pytest.raises(UserError, match=f"--api-key-file {path}.*{line}") as refused:
        read_key_file(path, "--api-key-file")
    assert "\n" not in str(refused.value) and "sk-" not in str(refused.value)


def rules(**options: Any) -> AccessRules:
    return read_rules(replace(ServeOptions(), **options))


def test_no_key_is_never_what_was_meant_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEYS, raising=False)
    assert rules().keys == ()
    for name in ("api_key_file", "admin_key_file"):
        for given in (write(tmp_path / "keys", ""), tmp_path / "nowhere", tmp_path):
            with pytest.raises(UserError, match="--" + name.replace("_", "-")):
                rules(**{name: given}, insecure=True)
    for text in ("", " , "):
        monkeypatch.setenv(API_KEYS, text)
        with pytest.raises(UserError, match="HIPPO_API_KEYS is set, but contains no key"):
            rules()
    monkeypatch.setenv(API_KEYS, "first, second,")
    assert keys_of_environment() == ("first", "second")
    found = rules(api_key_file=write(tmp_path / "keys", "third\n"), max_batch_size=4, max_queue=6)
    assert found.keys == ("first", "second", "third") and (found.max_requests, found.requests_per_key) == (10, 5)
    assert rules(requests_per_key=0).requests_per_key == 0
    monkeypatch.setenv(API_KEYS, "only")
    assert rules().requests_per_key == 0
    monkeypatch.delenv(API_KEYS)
    for address in ("0.0.0.0", "::", "192.168.1.5"):
        with pytest.raises(UserError, match="without an API key"):
            rules(address=address)
        assert rules(address=address, insecure=True).keys == ()
    assert rules(address="::1").keys == rules(address="127.0.0.2").keys == ()


def asking(**headers: str) -> Request:
    raw = [(name.replace("_", "-").lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "client": ("10.0.0.1", 5)})


def test_keys_in_any_header() -> None:
    access = Access(AccessRules(keys=("alice",), admin_keys=("root",)))
    for headers in (
        {"Authorization": "Bearer alice"},
        {"Authorization": "bearer  alice"},
        {"Authorization": "BEARER alice"},
        {"Authorization": "alice"},
        {"x_api_key": "alice"},
        {"api_key": "alice"},
        {"Authorization": "Bearer alice", "x_api_key": "wrong"},
        {"Authorization": "Bearer wrong", "x_api_key": "alice"},
        {"Authorization": "Basic wrong", "api_key": "alice"},
        {"Authorization": "Bearer root"},
    ):
        assert access.has_key(asking(**headers)), headers
        assert access.key_of(asking(**headers)) in ("alice", "root")
    for headers in (
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic alice"},
        {"x_api_key": "ü"},
    ):
        assert not access.has_key(asking(**headers)), headers


def test_only_some_may_change_the_model() -> None:
    access = Access(AccessRules(keys=("alice",), admin_keys=("root",)))
    access.check_admin(asking(x_api_key="root"))
    with pytest.raises(HTTPException, match="--admin-key-file"):
        access.check_admin(asking(x_api_key="alice"))
    Access(AccessRules(keys=("alice",))).check_admin(asking(x_api_key="alice"))
    without = Access(AccessRules(admin_keys=("root",)))
    assert without.has_key(asking())
    with pytest.raises(HTTPException, match="--admin-key-file"):
        without.check_admin(asking())


def test_places_are_given_back() -> None:
    """Also those of answers to one request, and of a client that had no key."""
    access = Access(AccessRules(keys=("alice", "bob"), max_requests=6, requests_per_key=4))
    first, second = asking(x_api_key="alice"), asking(x_api_key="bob")
    access.take_places(first, 1)
    access.take_places(first, 3)
    with pytest.raises(HTTPException, match="this key has 4 requests running or waiting; its limit is 4"):
        access.take_places(asking(x_api_key="alice"), 1)
    access.take_places(second, 2)
    with pytest.raises(HTTPException, match="this server has 6 requests running or waiting; its limit") as refused:
        access.take_places(asking(), 1)
    assert refused.value.status_code == 429 and refused.value.headers
    access.hold_places(first)  # its answers, in the background
    access.free_places(first)
    with pytest.raises(HTTPException, match="this key has 4"):
        access.take_places(asking(x_api_key="alice"), 1)
    for _ in range(3):
        access.free_places(first)
    access.free_places(asking())
    access.take_places(asking(x_api_key="alice"), 4)


def test_what_can_never_be_let_in_is_not_asked_to_try_again() -> None:
    access = Access(AccessRules(keys=("alice",), max_requests=3, requests_per_key=2))
    access.check_choices(asking(x_api_key="alice"), "n", 2)
    with pytest.raises(FieldError) as refused:
        access.check_choices(asking(x_api_key="alice"), "n", 3)
    assert str(refused.value) == "n asks for 3 answers at once; the limit of this key is 2 (--requests-per-key)"
    assert refused.value.field == "n"
    with pytest.raises(FieldError, match="prompt asks for 4 answers at once; the limit of this server is 3"):
        Access(AccessRules(max_requests=3)).check_choices(asking(), "prompt", 4)
    Access(AccessRules()).check_choices(asking(), "n", 128)
    access.take_places(asking(x_api_key="alice"), 1)
    with pytest.raises(HTTPException, match="this key has 1 request running or waiting; its limit is 2"):
        access.take_places(asking(x_api_key="alice"), 2)


def test_a_client_without_a_key_is_its_address_or_its_network() -> None:
    def ask(host: str) -> None:
        access.count_request(Request({"type": "http", "headers": [], "client": (host, 5)}))

    access = Access(AccessRules(requests_per_minute=1))
    for host in ("10.0.0.1", "10.0.0.2", "fd00::1", "fd00:0:0:1::1"):
        ask(host)
    for host in ("10.0.0.1", "fd00::2", "fd00::ffff:2"):
        with pytest.raises(HTTPException, match="try again in"):
            ask(host)


def test_a_debt_is_not_forgotten_among_many_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rate = Rate(60)
    rate.spend("debtor", 1000)
    for number in range(20_000):
        rate.spend(str(number), 1)
        now += 0.01
    assert rate.wait_s("debtor") > 500
    assert len(rate._buckets) < 12_000


def test_whose_prompts_are_shared() -> None:
    def salt(rules: AccessRules, key: str, **body: str) -> str:
        return accesses[rules].cache_salt(asking(**({"x_api_key": key} if key else {})), dict(body))

    with_keys, shared, open_ = (
        AccessRules(keys=("a", "b")),
        AccessRules(keys=("a", "b"), shares_prefixes=True),
        AccessRules(),
    )
    accesses = {rules: Access(rules) for rules in (with_keys, shared, open_)}
    assert salt(with_keys, "a") == salt(with_keys, "a") != salt(with_keys, "b")
    assert salt(with_keys, "a", cache_salt="x") not in (salt(with_keys, "a"), salt(with_keys, "b", cache_salt="x"))
    for rules in (shared, open_):
        assert salt(rules, "a") == salt(rules, "b") == salt(rules, "") == ""
        assert salt(rules, "a", cache_salt="x") == salt(rules, "b", cache_salt="x") != salt(rules, "b", cache_salt="y")

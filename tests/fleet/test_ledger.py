"""The ledger: accounts, sessions, tokens as rows, and an audit that cannot be changed unseen."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ota_fleet.ledger import Ledger
from ota_fleet.rows import Entry
from tests.fleet.test_registry import MD5, NOW, SHA256, by_hand, five_entries, opened, token


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the registry is, or will be."""
    return tmp_path / "fleet.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    """An empty one."""
    with opened(path) as registry:
        yield Ledger(registry)


# -- 1. Tokens ------------------------------------------------------------------------------------


def test_token_is_known_until_it_is_revoked(ledger: Ledger) -> None:
    first = ledger.add_token(token("CI", "publisher", "firmware", SHA256), "ada")
    second = ledger.add_token(token("door", "device", "", MD5), "ada")
    assert ledger.tokens() == [
        token("CI", "publisher", "firmware", SHA256, first),
        token("door", "device", "", MD5, second),
    ]
    assert ledger.revoke_token(second, "bob", NOW)
    assert not ledger.revoke_token(second, "bob", NOW)
    assert not ledger.revoke_token(10**30, "bob", NOW)
    assert [each.id for each in ledger.tokens()] == [first]
    assert [(entry.who, entry.action, entry.what) for entry in ledger.audit_log()] == [
        ("ada", "mint token", "1 (CI) publisher of firmware"),
        ("ada", "mint token", "2 (door) device"),
        ("bob", "revoke token", "2 (door) device"),
    ]


def test_id_of_a_token_is_never_used_again(path: Path) -> None:
    with opened(path) as registry:
        first = Ledger(registry).add_token(token("CI", "publisher", "", SHA256), "ada")
        Ledger(registry).revoke_token(first, "ada", NOW)
    with opened(path) as registry:
        assert Ledger(registry).add_token(token("CI", "publisher", "", SHA256), "ada") > first


def test_the_same_token_twice_is_refused(ledger: Ledger) -> None:
    ledger.add_token(token("CI", "publisher", "", SHA256), "ada")
    with pytest.raises(ValueError, match="known already"):
        ledger.add_token(token("CI", "admin", "", SHA256), "ada")
    assert [token.role for token in ledger.tokens()] == ["publisher"]
    assert len(ledger.audit_log()) == 1


# -- 2. Audit -------------------------------------------------------------------------------------


def test_entry_has_the_digest_that_the_documentation_says(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ledger.audit("ada", "upload", 'ü "1.0.0"', NOW)
    ledger.audit("bob", "withdraw", "", NOW + 1)
    first = hashlib.sha256(f'[1,{NOW},"ada","upload","ü \\"1.0.0\\""]'.encode()).hexdigest()
    second = hashlib.sha256(f'{first}[2,{NOW + 1},"bob","withdraw",""]'.encode()).hexdigest()
    assert ledger.audit_log() == [
        Entry(1, NOW, "ada", "upload", 'ü "1.0.0"', first),
        Entry(2, NOW + 1, "bob", "withdraw", "", second),
    ]
    assert first in caplog.text
    assert second in caplog.text


def test_log_tells_an_entry_once_it_is_written(
    ledger: Ledger, lines: Callable[[str], list[str]]
) -> None:
    def write(what: str) -> None:
        with ledger.registry.writing():
            ledger.audit("ada", "upload", what, NOW)
            assert not lines(what)
            if what == "fails":
                raise KeyError

    with pytest.raises(KeyError):
        write("fails")
    write("works")
    ledger.audit("ada", "upload", "alone", NOW)
    assert [line.split()[-1] for line in lines("INFO audit")] == ["'works'", "'alone'"]
    assert [entry.what for entry in ledger.audit_log()] == ["works", "alone"]


def test_audit_is_read_in_pages(path: Path) -> None:
    five_entries(path)
    with opened(path) as registry:
        assert [entry.number for entry in Ledger(registry).audit_log(2, 2)] == [3, 4]
        assert Ledger(registry).audit_log(5) == Ledger(registry).audit_log(10**30) == []
        assert len(Ledger(registry).audit_log(-1, 10**30)) == 5
        assert Ledger(registry).verify_audit()


def test_empty_audit_is_sound(ledger: Ledger) -> None:
    assert ledger.verify_audit()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET at = at + 1 WHERE number = 3",
        "UPDATE audit SET who = 'eve' WHERE number = 3",
        "UPDATE audit SET action = 'x' WHERE number = 5",
        "UPDATE audit SET what = '' WHERE number = 1",
        "UPDATE audit SET digest = 'x' WHERE number = 5",
        "UPDATE audit SET number = 7 WHERE number = 5",
        "DELETE FROM audit WHERE number = 1",
        "DELETE FROM audit WHERE number = 3",
        "DELETE FROM audit WHERE number = 5",
        "DELETE FROM audit",
        "DELETE FROM audit_head",
        "UPDATE audit SET number = -number; UPDATE audit SET number = 6 + number",
        "UPDATE audit SET number = 9 WHERE number = 2;"
        "UPDATE audit SET number = 2 WHERE number = 3;"
        "UPDATE audit SET number = 3 WHERE number = 9",
        "INSERT INTO audit SELECT 6, at, who, action, what, digest FROM audit WHERE number = 5",
        "INSERT INTO audit SELECT 0, at, who, action, what, digest FROM audit WHERE number = 1",
    ],
)
def test_audit_that_was_tampered_with_is_found(statement: str, path: Path) -> None:
    five_entries(path)
    with by_hand(path) as connection:
        connection.executescript(statement)
    with opened(path) as registry:
        assert not Ledger(registry).verify_audit()


def test_audit_goes_on_behind_the_last_entry(path: Path) -> None:
    five_entries(path)
    five_entries(path)
    with opened(path) as registry:
        assert [entry.number for entry in Ledger(registry).audit_log()] == list(range(1, 11))
        assert Ledger(registry).verify_audit()


def test_threads_that_write_at_once_make_one_chain(ledger: Ledger) -> None:
    def write() -> None:
        for _ in range(25):
            ledger.audit("x", "y", "z", NOW)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(ledger.audit_log(limit=1000)) == 100
    assert ledger.verify_audit()

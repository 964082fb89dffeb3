"""Keys of several hosts: one that joins an installation brings its keys, and locks nobody out."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from dar.errors import ConfigurationError
from dar.settings import Settings
from service import keys
from service.store import keys as key_store
from service.store.database import Database

NAMES = ("api_key", "worker_key", "reward_secret")


def configure(database: Database, home: Path, **given: str) -> list[str]:
    """Start a host; gives its three values."""
    settings = Settings(home=home, **{name: SecretStr(value) for name, value in given.items()})
    keys.configure(settings, database)
    return [given.get(name) or (home / name).read_text().strip() for name in NAMES]


def opens(database: Database, key: str) -> bool:
    with database.read() as transaction:
        row = key_store.look_up(transaction, keys.key_id(key))
        return row is not None and key_store.state_of(row, transaction.now) == "valid"


def test_a_host_that_starts_again_keeps_its_keys(database: Database, tmp_path: Path) -> None:
    first = configure(database, tmp_path / "a")
    assert configure(database, tmp_path / "a") == first
    assert all(opens(database, key) for key in first[:2])


@pytest.mark.parametrize("dialect", ["postgresql"], indirect=True)
def test_a_host_without_the_keys_of_the_others_does_not_start(
    database: Database, tmp_path: Path
) -> None:
    first = configure(database, tmp_path / "a")
    with pytest.raises(ConfigurationError, match="api_key, worker_key, reward_secret are not in"):
        configure(database, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []
    given = dict(zip(NAMES, first, strict=True))
    assert configure(database, tmp_path / "b", **given) == first
    assert all(opens(database, key) for key in first[:2])


@pytest.mark.parametrize("dialect", ["postgresql"], indirect=True)
def test_a_hosts_own_files_lock_no_other_host_out(database: Database, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in NAMES:
        (tmp_path / "b" / name).write_text(f"made-before-{name}\n")
    hosts = [configure(database, tmp_path / name) for name in "ab"]
    assert all(opens(database, key) for host in hosts for key in host[:2])


def test_a_setting_replaces_the_key_of_its_kind_alone(database: Database, tmp_path: Path) -> None:
    user, worker, _ = configure(database, tmp_path / "a")
    configure(database, tmp_path / "a", api_key="made-up-by-an-operator")
    seen = [opens(database, key) for key in ("made-up-by-an-operator", user, worker)]
    assert seen == [True, False, True]


@pytest.mark.parametrize("dialect", ["sqlite"], indirect=True)
def test_a_key_file_that_was_removed_is_replaced(database: Database, tmp_path: Path) -> None:
    old: Any = configure(database, tmp_path / "a")[0]
    (tmp_path / "a" / "api_key").unlink()
    new = configure(database, tmp_path / "a")[0]
    assert (opens(database, old), opens(database, new)) == (False, True)

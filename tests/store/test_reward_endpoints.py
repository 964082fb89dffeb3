"""Endpoints and their secrets in the database, on SQLite and PostgreSQL: what is moved to another
place cannot be read there.
"""

import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select, text, update

from dar.errors import ConfigurationError, ConflictError, NotFoundError, SecretUnreadableError
from dar.protocol.ids import new_id
from dar.protocol.worker import RewardAnnouncement, RewardProgress
from dar.settings import Settings, environment
from fakes.world import World
from service import keys, secret_box
from service.secret_box import SecretBox
from service.store import fence, reward_endpoints, reward_requests, reward_secrets
from service.store import tables as tables_
from service.store.database import Database
from service.store.tables import RewardRequestRow

BOX = SecretBox([secret_box.new_key()])
SIGNING, HEADER = "whsec_c2lnbmluZw==", "Bearer of-the-header"


def add(world: World, box: SecretBox = BOX, **values: Any) -> str:
    """An endpoint with a signing secret and a header; each a second younger than the one before."""
    world.clock.advance(1)
    endpoint = tables_.RewardEndpointRow(
        id=new_id("rwe_"),
        project_id=values.get("project_id", world.project_id),
        name="judge",
        url=values.get("url", "https://judge.example/score"),
        protocol="dar.reward.v1",
        options={},
    )
    with world.database.write() as transaction:
        reward_endpoints.add(transaction, endpoint)
        reward_secrets.add_signing(transaction, box, endpoint, SIGNING)
        reward_secrets.set_headers(transaction, box, endpoint, {"authorization": HEADER})
    return endpoint.id


def opened(world: World, endpoint_id: str, box: SecretBox = BOX) -> reward_secrets.Access:
    with world.database.read() as transaction:
        endpoint = reward_endpoints.get(transaction, world.project_id, endpoint_id)
        return reward_secrets.open_all(transaction, box, endpoint)


def test_secrets_come_back_to_their_own_endpoint(world: World) -> None:
    access = opened(world, add(world))
    assert (access.secrets, access.headers) == ([SIGNING], {"authorization": HEADER})
    assert SIGNING not in repr(access)
    assert HEADER not in repr(access)


@pytest.mark.parametrize(
    ("change", "victim"),
    [
        ("reward_secrets SET endpoint_id = :other WHERE endpoint_id = :mine", "other"),
        ("reward_endpoints SET url = 'https://evil.example/' WHERE id = :mine", "mine"),
        ("reward_endpoints SET url = 'http://judge.example/score' WHERE id = :mine", "mine"),
        ("reward_endpoints SET url = 'https://judge.example:444/' WHERE id = :mine", "mine"),
        ("reward_secrets SET kind = 'header', name = 'x-leak' WHERE kind = 'signing'", "mine"),
        ("reward_secrets SET name = 'x-leak' WHERE kind = 'header'", "mine"),
        ("reward_secrets SET token = 'nonsense'", "mine"),
    ],
)
def test_who_moves_rows_in_the_database_gains_nothing(
    world: World, change: str, victim: str
) -> None:
    ids = {"mine": add(world), "other": add(world, url="https://evil.example/")}
    with world.database.write() as transaction:
        used = {name: value for name, value in ids.items() if f":{name}" in change}
        transaction.execute(text(f"UPDATE {change}"), used)
    with pytest.raises(SecretUnreadableError) as caught:
        opened(world, ids[victim])
    assert SIGNING not in caught.value.message
    assert HEADER not in caught.value.message


def test_another_projects_endpoint_of_the_same_address_cannot_read_it(world: World) -> None:
    mine = add(world)
    with world.database.write() as transaction:
        row = tables_.ProjectRow(id="proj-other", created_at=transaction.now)
        transaction.add(row)
    with world.database.write() as transaction:
        transaction.execute(update(tables_.RewardEndpointRow).values(project_id="proj-other"))
    with world.database.read() as transaction:
        endpoint = reward_endpoints.get(transaction, "proj-other", mine)
        with pytest.raises(SecretUnreadableError):
            reward_secrets.open_all(transaction, BOX, endpoint)


def test_a_rotation_of_keys_keeps_every_secret_and_frees_the_old_key(world: World) -> None:
    old, new = secret_box.new_key(), secret_box.new_key()
    ids = [add(world, SecretBox([old])) for _ in range(3)]
    with world.database.write() as transaction:
        assert reward_secrets.rotate(transaction, SecretBox([new, old])) == 6
    for endpoint_id in ids:
        assert opened(world, endpoint_id, SecretBox([new])).secrets == [SIGNING]
        with pytest.raises(SecretUnreadableError):
            opened(world, endpoint_id, SecretBox([old]))


def test_a_rotation_renews_stored_poll_urls(world: World) -> None:
    old, new = secret_box.new_key(), secret_box.new_key()
    held = world.running()
    wanted = RewardAnnouncement(
        request_id="rwq_1",
        component="letters",
        step=1,
        sample_ids=["s0"],
        token_sha256="a" * 64,
        deadline=world.clock.now.timestamp() + 60,
    )
    accepted = RewardProgress(request_id="rwq_1", state="accepted", poll_url="/r?token=geheim")
    with world.database.write() as transaction:
        now, box = fence.hold(transaction, held.attempt.lease_id, 1), SecretBox([old])
        reward_requests.announce(transaction, box, now, wanted, is_signature_required=False)
        reward_requests.note_progress(transaction, box, now, [accepted])
    with world.database.write() as transaction:
        reward_secrets.rotate(transaction, SecretBox([new, old]))
        row = transaction.get_one(RewardRequestRow, "rwq_1")
        assert row.poll_url is not None
        assert "geheim" not in row.poll_url
        found = reward_requests.poll_url_of(row, SecretBox([new]), now)
    assert found == "/r?token=geheim"


def test_a_rotation_without_the_old_key_changes_nothing(world: World) -> None:
    old, new = secret_box.new_key(), secret_box.new_key()
    endpoint_id = add(world, SecretBox([old]))
    with pytest.raises(SecretUnreadableError), world.database.write() as transaction:
        reward_secrets.rotate(transaction, SecretBox([new]))
    assert opened(world, endpoint_id, SecretBox([old])).secrets == [SIGNING]


@pytest.mark.slow  # starts the service's command three times
def test_the_operators_command_rotates(world: World, url: str, tmp_path: Path) -> None:
    old, new = secret_box.new_key(), secret_box.new_key()
    endpoint_id = add(world, SecretBox([old]))
    variables = {"DAR_HOME": str(tmp_path), "DAR_DATABASE_URL": url}
    for given, code in ((new, 1), (f"{new},{old}", 0), (new, 0)):
        result = subprocess.run(
            [sys.executable, "-m", "service", "rotate-secrets"],
            env=environment() | variables | {"DAR_SECRET_KEYS": given},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == code, result.stderr
        assert old.encode() not in result.stderr
    assert opened(world, endpoint_id, SecretBox([new])).headers == {"authorization": HEADER}


def start(database: Database, home: Path, **given: str) -> list[str]:
    """Start a host; gives its keys."""
    home.mkdir(exist_ok=True)
    settings = Settings(home=home, **{name: SecretStr(value) for name, value in given.items()})
    return keys.secret_keys(settings, database)


def test_a_host_keeps_its_key_and_one_with_another_does_not_start(
    world: World, tmp_path: Path
) -> None:
    database = world.database
    first = start(database, tmp_path / "a")
    assert start(database, tmp_path / "a") == first
    assert (tmp_path / "a" / "secret_keys").stat().st_mode & 0o777 == 0o600
    add(world, SecretBox(first))
    with pytest.raises(ConfigurationError, match="secret_keys"):
        start(database, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []
    with pytest.raises(ConfigurationError, match="none of the keys"):
        start(database, tmp_path / "b", secret_keys=secret_box.new_key())
    new = secret_box.new_key()
    assert start(database, tmp_path / "b", secret_keys=f"{new}, {first[0]}") == [new, first[0]]


@pytest.mark.parametrize("dialect", ["postgresql"], indirect=True)
def test_a_second_host_needs_the_key_before_there_is_any_secret(
    world: World, tmp_path: Path
) -> None:
    first = start(world.database, tmp_path / "a")
    for given in ({}, {"secret_keys": secret_box.new_key()}):
        with pytest.raises(ConfigurationError):
            start(world.database, tmp_path / "b", **given)
    assert start(world.database, tmp_path / "b", secret_keys=first[0]) == first


def test_a_malformed_key_is_told_without_showing_it() -> None:
    with pytest.raises(ConfigurationError, match="url-safe base64") as caught:
        SecretBox(["not-a-key"])
    assert "not-a-key" not in caught.value.message


def test_a_fingerprint_tells_values_apart_at_one_endpoint_only() -> None:
    def of(endpoint_id: str, value: str, box: SecretBox = BOX) -> str:
        binding = secret_box.Binding("p", endpoint_id, "https://x:443", "header:a")
        return box.fingerprint(binding, value)

    assert of("1", "a") == of("1", "a")
    others = {of("1", "b"), of("2", "a"), of("1", "a", SecretBox([secret_box.new_key()]))}
    assert of("1", "a") not in others
    assert len(others) == 3


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Judge.Example/score?x=1", "https://judge.example:443"),
        ("https://judge.example.:443/", "https://judge.example:443"),
        ("http://judge.example/", "http://judge.example:80"),
        ("http://[::1]:9000/a", "http://[::1]:9000"),
    ],
)
def test_an_origin_has_one_spelling(url: str, origin: str) -> None:
    assert secret_box.origin_of(url) == origin


def test_a_deletion_and_a_submission_at_once_leave_no_job_without_its_endpoint(
    world: World,
) -> None:
    for _ in range(10):
        endpoint_id = add(world)
        outcomes: list[str] = []
        barrier = threading.Barrier(2)
        submission = threading.Thread(target=_submit, args=(world, endpoint_id, barrier, outcomes))
        submission.start()
        barrier.wait()
        try:
            with world.database.write() as transaction:
                reward_endpoints.remove(transaction, world.project_id, endpoint_id)
            outcomes.append("removed")
        except ConflictError:
            pass
        submission.join()
        assert len(outcomes) == 1, outcomes
        with world.database.read() as transaction:
            mine = tables_.JobEndpointRow.endpoint_id == endpoint_id
            linked = transaction.scalars(select(tables_.JobEndpointRow).where(mine)).all()
        assert len(linked) == (outcomes == ["submitted"])


def _submit(
    world: World, endpoint_id: str, barrier: threading.Barrier, outcomes: list[str]
) -> None:
    barrier.wait()
    with contextlib.suppress(NotFoundError), world.database.write() as transaction:
        reward_endpoints.get(transaction, world.project_id, endpoint_id, lock="keep")
        job = _job(world, endpoint_id)
        transaction.add(job)
        transaction.flush()
        reward_endpoints.link(transaction, job.id, {"j": endpoint_id})
        outcomes.append("submitted")


def _job(world: World, endpoint_id: str) -> Any:
    now = world.clock.now
    job_id = f"ftjob-{endpoint_id}"
    return tables_.JobRow(
        id=job_id,
        project_id=world.project_id,
        api_key_id="key-1",
        created_at=now,
        status="queued",
        model="base",
        model_source={},
        model_name=job_id,
        training_file="f",
        spec={},
        seed=1,
        total_steps=1,
        keep_last=1,
        not_before=now,
        body_sha256="0" * 64,
        retry_count=0,
    )

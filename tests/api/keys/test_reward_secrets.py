"""Secrets of inline reward URLs: one for each project, and rotated without a gap."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from dar.errors import ConfigurationError
from dar.protocol.ids import new_id
from dar.rewards.http.signing import decode_secret, verify
from dar.rewards.server.options import CheckedOptions
from fakes.command_line import run_command
from fakes.live_service import Judge, Live
from service import keys
from service.secret_box import SecretBox, new_key
from service.store import project_secrets, tables

PATH = "/v1/reward_secret"
REWARDS = {"components": [{"name": "letters", "url": "http://127.0.0.1:61999/score"}]}


def of_another_project(live: Live) -> Live:
    """The same service with a key of another project."""
    key = keys.new_api_key()
    with live.runtime.database.write() as transaction:
        project = tables.ProjectRow(id=new_id("proj-"), created_at=transaction.now)
        transaction.add(project)
        transaction.flush()
        row = {"id": keys.key_id(key), "sha256": keys.digest(key), "scopes": keys.USER_SCOPES}
        transaction.add(
            tables.ApiKeyRow(
                **row,
                project_id=project.id,
                is_configured=False,
                created_at=transaction.now,
                expires_at=None,
                revoked_at=None,
            )
        )
    return Live(live.app, live.settings, live.url, live.client(key), live.opened)


def secrets_of_a_claim(live: Live, slot: str = "0") -> list[str]:
    """The secrets for ``letters`` that come with the oldest job of all projects."""
    lease = live.claim(slot=slot)
    assert lease is not None
    found: list[str] = lease.body["rewards"]["letters"]["secrets"]
    return found


def test_a_claim_brings_the_secrets_of_its_own_job_and_no_others(live: Live) -> None:
    other = of_another_project(live)
    unused = live.register("https://judge.example/score")
    used = live.register("https://judge.example/score")
    components = [*REWARDS["components"], {"name": "j", "endpoint": used["id"]}]
    live.submit(dar={"rewards": {"components": components}}, skip_validation=True)
    other.submit(skip_validation=True)
    builtin = {"name": "b", "kind": "builtin", "fn": "length_penalty", "params": {"target": 5}}
    live.submit(dar={"rewards": {"components": [builtin]}})
    first, second, third = (live.claim(slot=slot) for slot in "012")
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.body["rewards"]["letters"]["secrets"] == [live.key("reward_secret")]
    assert first.body["rewards"]["j"]["secrets"] == [used["signing_secret"]]
    [theirs] = second.body["rewards"]["letters"]["secrets"]
    assert theirs not in {live.key("reward_secret"), used["signing_secret"]}
    decode_secret(theirs)
    assert unused["signing_secret"] not in str([first.body, second.body, third.body])
    assert third.body["rewards"] == {}
    assert [one.body["reward_secret"] for one in (first, second, third)] == [None, None, None]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_rotated_secret_overlaps_with_the_old_one_for_a_day(live: Live, is_first: bool) -> None:
    user = live if is_first else of_another_project(live)
    before = user.http.get(PATH).json()
    assert (before["generation"], before["is_configured"], before["old_until"]) == (
        0,
        is_first,
        None,
    )
    user.submit(skip_validation=True)
    [old] = secrets_of_a_claim(live)
    made = user.http.post(f"{PATH}/rotate").json()
    new = made["signing_secret"]
    assert (made["generation"], made["is_configured"]) == (1, False)
    assert made["fingerprints"][1:] == before["fingerprints"]
    user.submit(skip_validation=True)
    assert secrets_of_a_claim(live, "1") == [new, old]
    with live.runtime.database.write() as transaction:
        at = (transaction.now - timedelta(seconds=1)).replace(tzinfo=None)
        late = text("UPDATE projects SET old_reward_secret_until = :at WHERE reward_generation = 1")
        transaction.execute(late, {"at": at})
    user.submit(skip_validation=True)
    assert secrets_of_a_claim(live, "2") == [new]
    last = user.http.post(
        f"{PATH}/rotate", json={"keep_old_secret_active_for_24_hours": False}
    ).json()
    user.submit(skip_validation=True)
    assert secrets_of_a_claim(live, "3") == [last["signing_secret"]]
    assert len({old, new, last["signing_secret"]}) == 3


def test_the_services_own_requests_are_signed_with_the_secrets_of_the_project(
    live: Live, judge: Judge
) -> None:
    """Old and new are both on each request, so that services may change over one after another."""
    other = of_another_project(live)
    old = live.key("reward_secret")
    new = live.http.post(f"{PATH}/rotate").json()["signing_secret"]
    theirs = other.http.post(f"{PATH}/rotate").json()["signing_secret"]
    body = {"component": {"name": "letters", "url": judge.url}, "light": True}
    for user, accepted, refused in ((live, [old, new], theirs), (other, [theirs], old)):
        judge.seen.clear()
        assert user.http.post("/v1/reward_endpoints/probe", json=body).json()["ok"]
        headers, sent = judge.seen[0]
        for secret in accepted:
            verify([decode_secret(secret)], headers, sent)
        with pytest.raises(Exception, match="does not match"):
            verify([decode_secret(refused)], headers, sent)


def test_a_new_secret_is_put_before_the_old_one_in_the_file_of_a_reward_server(
    live: Live, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    old = live.key("reward_secret")
    file.write_text(old + "\n")
    environment = {"DAR_BASE_URL": live.url, "DAR_API_KEY": live.key("api_key")}
    rotate = ("reward", "rotate-secret")
    ended = run_command(*rotate, "--secret-file", str(file), environment=environment)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    new, *rest = file.read_text().splitlines()
    assert rest == [old]
    assert file.stat().st_mode & 0o077 == 0
    live.submit(skip_validation=True)
    assert secrets_of_a_claim(live) == [new, old]
    accepted = CheckedOptions(secret_file=file).keys()
    assert accepted == (decode_secret(new), decode_secret(old))
    missing = run_command(
        *rotate, "--secret-file", str(tmp_path / "none" / "x"), environment=environment
    )
    assert (missing.returncode, "cannot be rewritten" in missing.stderr) == (2, True)
    printed = run_command(*rotate, "--drop-old", environment=environment).stdout.strip()
    live.submit(skip_validation=True)
    assert secrets_of_a_claim(live, "1") == [printed]
    assert live.http.get(PATH).json()["generation"] == 2


def test_several_secrets_of_the_settings_all_sign(serve: Callable[..., Live]) -> None:
    both = [keys.new_reward_secret(), keys.new_reward_secret()]
    live = serve(reward_secret=SecretStr(",".join(both)))
    live.submit(skip_validation=True)
    assert secrets_of_a_claim(live) == both


def test_a_lost_key_of_secrets_is_noticed_where_a_secret_was_derived_and_nowhere_else(
    live: Live,
) -> None:
    database, file = live.runtime.database, live.settings.home / "secret_keys"
    kept = file.read_text()

    def start() -> Any:
        return keys.secret_keys(live.settings, database)

    file.unlink()
    start()  # no project has a derived secret yet, so a new root does no harm
    box = SecretBox(start())
    with database.write() as transaction:
        project_secrets.rotate(transaction, _first(live), is_overlapping=False)
        project_secrets.secrets_of(transaction, box, (), _first(live))
    file.write_text(kept)
    with pytest.raises(ConfigurationError, match="none of the keys"):
        start()
    file.unlink()
    with pytest.raises(ConfigurationError, match="is not in"):
        start()


def test_the_root_is_encrypted_anew_with_the_other_secrets(live: Live) -> None:
    database = live.runtime.database
    with database.write() as transaction:
        project_secrets.rotate(transaction, _first(live), is_overlapping=False)
    old = keys.secret_keys(live.settings, database)
    newer = SecretBox([new_key(), *old])
    with database.write() as transaction:
        before = project_secrets.secrets_of(transaction, newer, (), _first(live)).values
        project_secrets.renew(transaction, newer)
    with database.read() as transaction:
        token = project_secrets.token_in_use(transaction)
        assert token is not None
        assert not SecretBox(old).is_readable(token)
        assert project_secrets.secrets_of(transaction, newer, (), _first(live)).values == before


def _first(live: Live) -> str:
    with live.runtime.database.read() as transaction:
        found: str = transaction.query(tables.ProjectRow.id).scalar()
    return found

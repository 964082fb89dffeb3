"""Jobs whose reward services misbehave in every way at once, each beside one that conforms.

The tests are slow because each trains whole jobs, and a trainer spends some six CPU seconds on
importing torch.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.worker import WAKE_TASK
from fakes.installation import BrokerLog, Installation
from fakes.reward_server import RewardServer

STEPS, GROUPS, K = 2, 2, 4
REQUESTS = STEPS * GROUPS
"""Of each component: one for each group."""

Ending = str | set[str]
"""``right``: all rewards come; ``some``: those that were sent; ``skip``: none, and no failure; else
the failures' codes."""

ANSWERS: dict[str, Ending] = {
    "one-short": "contract.length",
    "one-for-all": "contract.length",
    "no-rewards": "contract.length",
    "nan": "contract.nonfinite",
    "infinity": "contract.nonfinite",
    "1e400": "contract.nonfinite",
    "400-digits": "contract.nonfinite",
    "a-text": "contract.type",
    "a-bool": "contract.type",
    "a-list": "contract.type",
    "an-object": "contract.type",
    "all-null": "skip",
    "some-null": "some",
    "duplicate-id": "contract.ids",
    "unknown-id": "contract.ids",
}
"""Answers that break the contract, or say that there is no reward. A job has room for fifteen of
them."""

UNREADABLE = (
    "retry-after/0.2;-1;soon;Sun,%2006%20Nov%201994%2008:49:37%20GMT;"
    "Fri,%2031%20Dec%2099999999999999999999%2023:59:59%20GMT"
)
"""A wait that can be kept, and four that cannot."""
BLACK_HOLE = "black-hole"
"""No path of the server, but an address that drops what arrives."""
TRANSPORT: dict[str, Ending] = {
    "missing-id": "contract.ids",
    "slow-body": "timeout",
    "slow-headers": "timeout",
    "endless-1xx": "timeout",
    "no-answer": "timeout",
    BLACK_HOLE: "connect_timeout",
    "reset-in-head": "connect",
    "reset-in-body": "connect",
    "short-body": "protocol",
    "closes-idle": "right",
    "aborts-reused": "right",
    "status/500?first=10": "right",
    UNREADABLE: "right",
    "retry-after/999999": {"http_429", "deadline"},
    "echo/503": "http_503",
}
"""Answers that come slowly, in part, later, or with what they were asked with."""


TASKS_LEFT = ("Task was destroyed", "was never retrieved", "was never awaited", "Unclosed")
"""What Python writes into a log of tasks, exceptions and connections that nobody looked after."""


class Credentials:
    """What a reward service is shown and nobody else."""

    def __init__(self) -> None:
        self.bearer = f"Bearer {secrets.token_hex(20)}"
        self.key = secrets.token_hex(20)
        self.signing = ""

    @property
    def hidden(self) -> list[str]:
        return [self.bearer.split()[1], self.key, self.signing.removeprefix("whsec_")]

    def register(self, installation: Installation, url: str) -> str:
        """A registered endpoint with these secrets; all share one signing secret."""
        given = {"signing_secret": self.signing} if self.signing else {}
        made = installation.client.reward_endpoints.create(
            url[-60:], url, headers={"authorization": self.bearer, "x-key": self.key}, **given
        )
        self.signing = made.signing_secret
        return str(made.id)


ALONE = ("closes-idle", "aborts-reused", "retry-after")
"""Behaviours that matter only for requests in sequence."""


def component(endpoint: str, path: str, name: str) -> dict[str, Any]:
    """One that may fail, soon; a burst of failures gets so many attempts that it can pass."""
    is_patient = path == "fine" or path.startswith("status")
    return {
        "name": name,
        "endpoint": endpoint,
        "required": path == "fine",
        "batch": {"max_samples": K, "linger_ms": 0},
        "limits": {"concurrency": 1 if path.startswith(ALONE) else 4},
        "timeouts": {"attempt": 20, "deadline": 60}
        if is_patient
        else {"connect": 0.5, "attempt": 1, "deadline": 2.5},
        "retry": {
            "attempts": 9 if path.startswith(("status", UNREADABLE)) else 2,
            "base": 0.02,
            "cap": 0.1,
        },
    }


def train(
    installation: Installation,
    reviews_base: Path,
    url_of: Callable[[str], str],
    paths: Mapping[str, Ending],
    own: Credentials,
    until: Callable[..., Any],
) -> tuple[Any, bytes]:
    """The finished job and its trainer's log.

    Component ``rN`` is the N-th path, and ``good`` the one that conforms.
    """
    places = {"good": "fine", **{f"r{number}": path for number, path in enumerate(paths)}}
    components = [
        component(own.register(installation, url_of(path)), path, name)
        for name, path in places.items()
    ]
    spec = installation.spec(
        installation.client.files.create(reviews_base / "prompts.jsonl").id,
        hyperparameters={"max_steps": STEPS, "batch_size": GROUPS},
        rewards={"components": components, "failure": {"max_failed_fraction": 1}},
    )
    # A dry run would refuse most of these services.
    job_id = installation.client.jobs.create(**spec, skip_validation=True).id
    # It goes with the attempt's folder, unless it is open.
    with until(installation.trainer_logs, 30, "the trainer has a log")[0].open("rb") as log:
        job = installation.until_done(job_id, 120)
        assert (job.status, job.error) == ("succeeded", None)
        return job, log.read()


def assert_ended_as_told(installation: Installation, job: Any, paths: Mapping[str, Ending]) -> None:
    client = installation.client
    series = client.jobs.metrics(job.id).series
    failures = list(client.jobs.reward_failures(job.id, limit=100))
    stats = {one.component: one for one in client.jobs.reward_stats(job.id).components}
    for number, (path, ending) in enumerate(paths.items()):
        name = f"r{number}"
        codes = {one.code for one in failures if one.component == name}
        missing = series[f"rewards/{name}/missing_fraction"].value
        has_numbers = f"rewards/{name}/mean" in series
        failed = stats[name].failed_requests
        if ending == "right":
            assert (codes, missing, failed) == (set(), [0] * STEPS, 0), path
        elif ending == "some":
            assert (codes, missing, failed) == (set(), [1 / K] * STEPS, 0), path
        elif ending == "skip":
            assert (codes, missing, has_numbers, failed) == (set(), [1] * STEPS, False, 0), path
        else:
            allowed = {ending} if isinstance(ending, str) else ending
            assert codes, path
            assert codes <= allowed, path
            assert (missing, has_numbers) == ([1] * STEPS, False), path
            assert failed == REQUESTS, path
    totals = client.jobs.reward_stats(job.id)
    assert (totals.rewards, totals.skips, totals.errors) == (REQUESTS * K, 0, 0)


def assert_rewards_were_sent(
    installation: Installation, job: Any, paths: Mapping[str, Ending]
) -> None:
    """No sample has a number that was not sent for it: a right one follows from the sample's own
    id.
    """
    right = [f"r{number}" for number, ending in enumerate(paths.values()) if ending == "right"]
    some = [f"r{number}" for number, ending in enumerate(paths.values()) if ending == "some"]
    rows = list(installation.client.jobs.samples(job.id, limit=100))
    assert len(rows) == STEPS * GROUPS * K
    for row in rows:
        sent = (row.group * K + row.index) / 8
        expected = {"good": sent, **dict.fromkeys(right, sent)}
        # The first sample of each request is the one that is skipped.
        expected |= dict.fromkeys(some if row.index else [], sent)
        found = {name: value for name, value in row.components.items() if value is not None}
        assert found == expected
        assert row.reward == pytest.approx(sent * (1 + len(right)))


def assert_nothing_is_left(
    installation: Installation,
    job: Any,
    log: bytes,
    own: Credentials,
    broker: BrokerLog,
    find_secrets: Any,
    until: Any,
) -> None:
    client = installation.client
    until(lambda: not installation.trainers(), 30, "no process of the job is left")
    shown: list[Any] = [client.jobs.retrieve(job.id), client.jobs.reward_stats(job.id)]
    for listing in (client.jobs.events, client.jobs.reward_failures, client.jobs.samples):
        shown += listing(job.id, limit=100)
    text = json.dumps([one.model_dump() for one in shown]).encode()
    assert find_secrets(text, own.hidden) == []
    assert find_secrets(broker.content, own.hidden) == []
    assert WAKE_TASK.encode() in broker.content, "the broker was in use"
    assert installation.files_with_secrets(own.hidden) == []
    assert b"reward" in log
    assert find_secrets(log, [*own.hidden, *TASKS_LEFT]) == []


def check(
    installation: Installation,
    reviews_base: Path,
    url_of: Callable[[str], str],
    paths: Mapping[str, Ending],
    broker_log: BrokerLog,
    find_secrets: Any,
    until: Callable[..., Any],
) -> Any:
    """The finished job, after everything that must hold of it was looked at."""
    own = Credentials()
    job, log = train(installation, reviews_base, url_of, paths, own, until)
    assert_ended_as_told(installation, job, paths)
    assert_rewards_were_sent(installation, job, paths)
    assert_nothing_is_left(installation, job, log, own, broker_log, find_secrets, until)
    return job


@pytest.mark.slow  # a whole job is trained, and its rewards time out
@pytest.mark.timeout(240)
def test_services_that_break_the_contract_cost_their_own_rewards_alone(
    installation: Installation,
    hostile_server: RewardServer,
    reviews_base: Path,
    broker_log: BrokerLog,
    find_secrets: Any,
    until: Callable[..., Any],
) -> None:
    looked_at = (reviews_base, hostile_server.at, ANSWERS, broker_log, find_secrets, until)
    check(installation, *looked_at)
    assert max(hostile_server.counts.values()) <= 2 * REQUESTS


@pytest.mark.slow  # a whole job is trained, and its rewards time out
@pytest.mark.timeout(240)
def test_services_that_break_the_connection_cost_their_own_rewards_alone(
    installation: Installation,
    hostile_server: RewardServer,
    black_hole: str,
    reviews_base: Path,
    broker_log: BrokerLog,
    find_secrets: Any,
    until: Callable[..., Any],
) -> None:
    def url_of(path: str) -> str:
        return f"{black_hole}{BLACK_HOLE}" if path == BLACK_HOLE else hostile_server.at(path)

    looked_at = (reviews_base, url_of, TRANSPORT, broker_log, find_secrets, until)
    job = check(installation, *looked_at)
    assert hostile_server.counts.pop("/status/500") == REQUESTS + 10
    waits = REQUESTS + UNREADABLE.count(";") + 1
    assert hostile_server.counts.pop(f"/{UNREADABLE}") == waits
    assert max(hostile_server.counts.values()) <= 2 * REQUESTS
    states = [
        event.data["state"]
        for event in installation.client.jobs.events(job.id, order="asc", limit=100)
        if event.data
        and event.data.get("kind") == "reward_breaker"
        and event.data["component"] == f"r{list(TRANSPORT).index('status/500?first=10')}"
    ]
    assert states[0] == "open"
    assert states[-1] == "closed"

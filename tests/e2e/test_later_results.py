"""Results that come after a 202: too late, never, twice, in two versions, or from two of the
service's workers at once.

The test is slow because it trains a whole job, and a trainer spends some six CPU seconds on
importing torch.
"""

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.installation import BrokerLog, Installation

K = 4
DEADLINE = 5.0
"""Seconds; the test waits that long for the result that never comes."""
SIMPLE, TWICE, NEVER, AT_ONCE = ("g0", "g1", "g2", "g3")
"""Groups of the first step, named after what becomes of their results."""


class Judge:
    """Answers 202, then calls back; what came of each call is kept."""

    def __init__(self) -> None:
        self.told: dict[str, list[tuple[int, str]]] = {}
        self.late: dict[str, Any] = {}
        self.requests: list[dict[str, Any]] = []
        self.threads: list[threading.Thread] = []
        self.lock = threading.Lock()
        self.http = httpx2.Client(trust_env=False, verify=False, timeout=30)

    def __call__(self, _: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        request = json.loads(body)
        thread = threading.Thread(target=self.judge, args=(request,))
        with self.lock:
            self.requests.append(request)
            self.threads.append(thread)
        thread.start()
        return 202, {"request_id": request["request_id"], "status": "accepted"}

    def judge(self, request: dict[str, Any]) -> None:
        (group,) = {sample["group_id"] for sample in request["samples"]}
        if request["step"] > 1:
            # By now the deadline of the result that was not sent has passed.
            if late := self.late.pop(NEVER, None):
                self.post(NEVER, late, 7.0)
            self.post("later", request, 1.0)
        elif group == NEVER:
            self.late[NEVER] = request
        elif group == AT_ONCE:
            with ThreadPoolExecutor(4) as workers:
                list(
                    workers.map(
                        lambda value: self.post(group, request, value), (2.0, 3.0, 4.0, 5.0)
                    )
                )
        else:
            self.post(group, request, 1.0)
            if group == TWICE:
                self.post(group, request, 1.0)
                self.post(group, request, 9.0)

    def post(self, group: str, request: dict[str, Any], value: float) -> None:
        """The rewards are ``value`` and up."""
        callback = request["reply"]["callback"]
        body = {
            "type": "reward.result",
            "request_id": request["request_id"],
            "rewards": [value + sample["index"] / 8 for sample in request["samples"]],
        }
        headers = {"authorization": f"Bearer {callback['token']}"}
        answer = self.http.post(callback["url"], json=body, headers=headers)
        with self.lock:
            self.told.setdefault(group, []).append(
                (answer.status_code, f"{answer.json().get('status')} {value}")
            )

    def close(self) -> None:
        for thread in self.threads:
            thread.join()
        self.http.close()


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
def test_exactly_one_result_in_time_counts(
    installation: Installation,
    reviews_base: Path,
    serve: Callable[..., str],
    broker_log: BrokerLog,
    find_secrets: Callable[..., Any],
) -> None:
    client = installation.client
    judge = Judge()
    component = {
        "name": "judge",
        "url": serve(judge),
        "reply": "either",
        "batch": {"max_samples": K},
        "timeouts": {"deadline": DEADLINE},
    }
    spec = installation.spec(
        client.files.create(reviews_base / "prompts.jsonl").id,
        hyperparameters={"max_steps": 2, "batch_size": 4},
        rewards={"components": [component], "failure": {"max_failed_fraction": 1}},
    )
    # A judge that answers everything later answers a dry run so too.
    job = installation.until_done(client.jobs.create(**spec, skip_validation=True).id)
    judge.close()
    assert (job.status, job.error) == ("succeeded", None)

    assert judge.told[SIMPLE] == [(200, "accepted 1.0")]
    assert judge.told[TWICE] == [(200, "accepted 1.0"), (200, "duplicate 1.0"), (409, "None 9.0")]
    assert judge.told[NEVER] == [(410, "None 7.0")]
    assert judge.told["later"] == [(200, "accepted 1.0")] * 4
    assert sorted(status for status, _ in judge.told[AT_ONCE]) == [200, 409, 409, 409]
    (winner,) = (float(said.split()[1]) for status, said in judge.told[AT_ONCE] if status == 200)

    starts = {SIMPLE: 1.0, TWICE: 1.0, NEVER: None, AT_ONCE: winner}
    rows = list(client.jobs.samples(job.id, step=1, limit=100))
    assert len(rows) == 4 * K
    for row in rows:
        start = starts[f"g{row.group}"]
        expected = None if start is None else start + row.index / 8
        assert (row.reward, row.components["judge"]) == (expected, expected)
        assert row.reward_status == ("error" if start is None else "reward")
    (failure,) = client.jobs.reward_failures(job.id)
    assert (failure.step, failure.code, failure.samples, failure.attempts) == (
        1,
        "callback_late",
        K,
        1,
    )
    stats = client.jobs.reward_stats(job.id)
    assert (stats.rewards, stats.errors, stats.skips) == (7 * K, K, 0)
    kinds = [
        event.data.get("kind") for event in client.jobs.events(job.id, limit=100) if event.data
    ]
    assert kinds.count("reward_callback_late") == 1
    assert kinds.count("reward_callback_conflict") == 2
    tokens = [request["reply"]["callback"]["token"] for request in judge.requests]
    assert len(set(tokens)) == 8
    assert find_secrets(broker_log.content, tokens) == []
    assert installation.files_with_secrets(tokens) == []

"""What becomes of callbacks of reward services, as Prometheus sees it."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import get_args

from fakes.live_service import Live
from service.store import reward_requests
from service.telemetry import CALLBACK_OUTCOMES

TOKEN = "rwt_" + "x" * 43


def test_prometheus_counts_callbacks_by_what_became_of_them(live: Live) -> None:
    fates = set(get_args(reward_requests.CallbackOutcome)) - {"replayed"}
    assert {*fates, "refused", "unsupported", "too_large"} == set(CALLBACK_OUTCOMES)
    _, lease = live.running()
    deadline = (datetime.now(UTC) + timedelta(seconds=60)).timestamp()
    asked = {
        "request_id": "rwq_1", "component": "letters", "step": 3, "sample_ids": ["s0", "s1"], "deadline": deadline,
        "token_sha256": hashlib.sha256(TOKEN.encode()).hexdigest(),
    }  # fmt: skip
    lease.post("/reward_requests", requests=[asked]).raise_for_status()
    http = live.client(None)

    def post(token: str, *rewards: float) -> None:
        body = {"type": "reward.result", "request_id": "rwq_1", "rewards": rewards}
        headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
        http.post("/v1/reward_callbacks/rwq_1", content=json.dumps(body), headers=headers)

    post(TOKEN, 1, 2)
    post(TOKEN, 1, 2)
    post(TOKEN, 2, 2)
    post("rwt_wrong", 1, 2)
    told = live.http.get("/metrics").text
    start = 'dar_reward_callback_total{status="'
    lines = [line.removeprefix(start) for line in told.splitlines() if line.startswith(start)]
    counts = {line.partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert counts.keys() == set(CALLBACK_OUTCOMES)
    assert {fate: count for fate, count in counts.items() if count} == {
        "accepted": 1,
        "duplicate": 1,
        "conflict": 1,
        "refused": 1,
    }

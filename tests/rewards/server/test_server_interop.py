"""Reward servers and others' libraries: signatures of the reference package are taken, ours are
verified by it and by OpenAI's.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from queue import Queue
from threading import Event
from typing import Any

import httpx2
import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from dar.protocol.rewards import decode_response, decode_result
from dar.rewards.server import reward_server
from fakes.loopback import LoopbackServer, Request

OTHER = "whsec_" + "b" * 32
TOKEN = "rwt_" + "k" * 43
SAMPLE = {
    "id": "s0", "group_id": "g0", "index": 0, "prompt": "p", "messages": None, "completion": "grün", "finish_reason": "stop",
    "completion_tokens": 1, "ground_truth": None, "columns": {}, "metadata": {"policy_version": 0, "truncated": False},
}  # fmt: skip


def lengths(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


class Sender:
    """Somebody else's trainer: everything it signs and verifies, it does with the reference
    package.
    """

    def __init__(self, url: str, secret: str) -> None:
        self.client = httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30)
        self.webhook = Webhook(secret)

    async def post(self, callback: str | None = None, age: float = 0.0) -> httpx2.Response:
        now = datetime.now(UTC)
        reply: dict[str, Any] = {
            "modes": ["sync"],
            "deadline": f"{now + timedelta(seconds=60):%Y-%m-%dT%H:%M:%SZ}",
        }
        if callback is not None:
            reply |= {"modes": ["sync", "async"], "callback": {"url": callback, "token": TOKEN}}
        content = {
            "type": "reward.request", "version": "dar.reward.v1", "request_id": "rwq_1", "job_id": None, "component": "r",
            "step": 1, "mode": "train", "created_at": "2026-11-22T09:40:00Z", "samples": [SAMPLE], "reply": reply,
        }  # fmt: skip
        body = json.dumps(content, ensure_ascii=False)
        headers = {"content-type": "application/json", **self.signed(body, age)}
        return await self.client.post("/score", content=body.encode(), headers=headers)

    async def fetch(self) -> httpx2.Response:
        while True:
            answer = await self.client.get("/results/rwq_1", headers=self.signed("", 0))
            if answer.status_code != 202:
                return answer
            await asyncio.sleep(0.01)

    def signed(self, body: str, age: float) -> dict[str, str]:
        at = datetime.now(UTC) - timedelta(seconds=age)
        return {
            "webhook-id": "rwq_1",
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": self.webhook.sign("rwq_1", at, body),
        }


@pytest.fixture
async def sender(
    serve_app: Callable[..., str], secret: str
) -> AsyncIterator[Callable[..., Sender]]:
    made: list[Sender] = []

    def make(function: Any = lengths, signing: str = secret, **options: Any) -> Sender:
        url = serve_app(reward_server(**{"secret": secret, **options})(function))
        made.append(Sender(url, signing))
        return made[-1]

    yield make
    for item in made:
        await item.client.aclose()


Post = tuple[dict[str, str], bytes]


@pytest.fixture
def receiver() -> Iterator[tuple[str, Queue[Post]]]:
    """A service that takes every callback."""
    posts: Queue[Post] = Queue()

    def take(request: Request) -> None:
        posts.put((request.headers, request.body))
        request.answer(b"")

    with LoopbackServer(take) as server:
        yield server.at("rwq_1"), posts


def assert_verifies(headers: Any, body: bytes, secret: str) -> None:
    """It is signed for everybody who has the secret, and for nobody else."""
    three = {name: headers[f"webhook-{name}"] for name in ("id", "timestamp", "signature")}
    given = {f"webhook-{name}": value for name, value in three.items()}
    assert given["webhook-id"].startswith("rwr_")
    Webhook(secret).verify(body, given)
    with OpenAI(api_key="none", webhook_secret=secret) as client:
        client.webhooks.verify_signature(body, given)
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.verify_signature(body + b" ", given)
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(body, given)


async def test_a_request_that_the_reference_package_signed_is_answered_and_signed_in_return(
    sender: Any, secret: str
) -> None:
    answer = await sender().post()
    assert answer.status_code == 200
    assert [r.reward for r in decode_response(answer.content, request_id="rwq_1", ids=["s0"])] == [
        4.0
    ]
    assert_verifies(answer.headers, answer.content, secret)


@pytest.mark.parametrize(("age", "status"), [(290, 200), (302, 401), (-302, 401)])
async def test_a_replay_is_good_for_five_minutes(sender: Any, age: float, status: int) -> None:
    assert (await sender().post(age=age)).status_code == status


async def test_while_a_secret_is_rotated_either_opens_and_both_sign(
    sender: Any, secret: str
) -> None:
    for signing in (secret, OTHER):
        answer = await sender(signing=signing, secret=[OTHER, secret]).post()
        assert answer.status_code == 200
        assert len(answer.headers["webhook-signature"].split()) == 2
        for known in (secret, OTHER):
            Webhook(known).verify(answer.content, dict(answer.headers))


async def test_later_results_are_signed_on_both_ways(
    sender: Any, secret: str, receiver: tuple[str, Queue[Post]]
) -> None:
    url, posts = receiver
    asked = sender(asynchronous=True)
    assert (await asked.post(callback=url)).status_code == 202
    fetched = await asked.fetch()
    assert_verifies(fetched.headers, fetched.content, secret)
    headers, body = await asyncio.to_thread(posts.get, timeout=30)
    assert headers["authorization"] == f"Bearer {TOKEN}"
    assert_verifies(headers, body, secret)
    for found in (
        decode_response(fetched.content, request_id="rwq_1", ids=["s0"]),
        decode_result(body, request_id="rwq_1", ids=["s0"]),
    ):
        assert [result.reward for result in found] == [4.0]


async def test_a_server_without_a_secret_posts_to_no_callback(
    sender: Any, receiver: tuple[str, Queue[Post]]
) -> None:
    url, posts = receiver
    ended = Event()

    def reward(prompts: Any, completions: list[str], **_: Any) -> list[float]:
        ended.wait(30)
        return [1.0]

    asked = sender(reward, secret=None, asynchronous=True)
    assert (await asked.post(callback=url)).status_code == 202
    ended.set()
    assert (await asked.fetch()).json()["results"] == [{"id": "s0", "reward": 1.0}]
    # A callback would have begun with the result; the next whole exchange is over after it.
    assert (await asked.post(callback=url)).status_code == 200
    await asyncio.sleep(0.3)
    assert posts.empty()

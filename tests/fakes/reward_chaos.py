"""Rewards that come late, and a reward service on loopback whose manners can be spoiled.

A reward is a function of its completion.
"""

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dar.protocol.reward_spec import Rewards
from fakes.reward_server import RewardServer, ScoreRequest

if TYPE_CHECKING:  # importing torch takes seconds, and some users need the service alone
    from dar.training import DARTrainer

WIDE = {"per_device_train_batch_size": 12, "dar_k": 4, "max_new_tokens": 5, "learning_rate": 1e-2}
"""48 completions: three parts."""

Manners = Callable[[ScoreRequest], bool]
"""Is shown each request; whether it has spoiled it."""


def reward_of(completion: str) -> float:
    """Between 0 and 1, different for nearly all completions."""
    return int.from_bytes(hashlib.sha256(completion.encode()).digest()[:4]) / 2**32


async def late(completions: list[str], **_: Any) -> list[float | None]:
    """Each group after a time of its own; every ninth completion has no reward."""
    rewards = [reward_of(text) for text in completions]
    await asyncio.sleep(0.05 * rewards[0])
    return [None if int(1e6 * reward) % 9 == 0 else reward for reward in rewards]


def result_of(trainer: "DARTrainer", sink: Any) -> tuple[dict[str, Any], dict[int, Any]]:
    """Weights, and everything said that is no time."""
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return weights, sink.deterministic_reports()


def assert_same(one: "tuple[DARTrainer, Any]", other: "tuple[DARTrainer, Any]") -> None:
    """To the last bit."""
    (weights, reports), (others, other_reports) = result_of(*one), result_of(*other)
    assert [name for name in weights if not weights[name].equal(others[name])] == []
    assert reports == other_reports


def results_of(request: ScoreRequest) -> list[dict[str, Any]]:
    return [
        {"id": sample["id"], "reward": reward_of(sample["completion"])}
        for sample in request.samples
    ]


def send(
    request: ScoreRequest, results: list[dict[str, Any]], request_id: str | None = None
) -> None:
    """Answer in any order."""
    random.shuffle(results)
    request.json({"request_id": request_id or request.request_id, "results": results})


def service(manners: Manners = lambda _: False) -> RewardServer:
    """A service that answers what its manners have not spoiled."""

    def behave(request: ScoreRequest) -> None:
        if not manners(request):
            send(request, results_of(request))

    return RewardServer(behave)


PASSING = ("503", "429", "reset", "hang")
BROKEN = ("short", "long", "text", "not_a_number", "an_id_twice", "of_another", "no_json", "twice")


class Chaos:
    """Up to two passing faults, or one broken answer, before each request is answered.

    Answers come late and in any order.

    A request that allows it is sometimes answered later, to a poll.
    """

    def __init__(self, hang_seconds: float) -> None:
        self._random = random.Random(5)
        self._left: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self._hang_seconds = hang_seconds
        self._later: dict[str, list[dict[str, Any]]] = {}
        self.met: list[str] = []

    def __call__(self, request: ScoreRequest) -> bool:
        if request.method == "GET":
            request_id = request.path[1:]
            send(request, self._later[request_id], request_id)
            return True
        with self._lock:
            left = self._left.setdefault(request.request_id, self._draw())
            fault = left.pop() if left else ""
            self.met.append(fault)
            pause = self._random.random() * 0.05
            is_later = "async" in request.content["reply"]["modes"] and self._random.random() < 0.5
        time.sleep(pause)
        if fault in PASSING:
            self._fail(request, fault)
        elif fault:
            _break(request, fault)
        elif is_later:
            self.met.append("later")
            self._later[request.request_id] = results_of(request)
            request.accept(poll_url=f"/{request.request_id}")
        return bool(fault) or is_later

    def _fail(self, request: ScoreRequest, fault: str) -> None:
        if fault == "503":
            request.json({}, 503)
        elif fault == "429":
            request.json({}, 429, retry_after="0")
        elif fault == "reset":
            request.reset()
        else:
            time.sleep(self._hang_seconds)

    def _draw(self) -> list[str]:
        """What the next new request meets, the last one first: a broken answer every third time, so
        that all of them occur.
        """
        number = len(self._left)
        if number % 3 == 0:
            return [BROKEN[number // 3 % len(BROKEN)]]
        return self._random.choices(PASSING, k=self._random.randrange(3))


def _break(request: ScoreRequest, fault: str) -> None:
    """Answer in a way that no reward may be taken from, but for those of an answer that is only
    sent twice.
    """
    results, request_id = results_of(request), request.request_id
    wrong = [{"id": one["id"], "reward": 0.5} for one in results]
    if fault == "short":
        send(request, wrong[1:])
    elif fault == "long":
        send(request, [*wrong, {"id": "s9999", "reward": 0.5}])
    elif fault == "text":
        send(request, [{**one, "reward": "0.5"} for one in results])
    elif fault == "not_a_number":
        send(request, [*wrong[1:], {**wrong[0], "reward": float("nan")}])
    elif fault == "an_id_twice":
        send(request, [wrong[0], *wrong[:-1]])
    elif fault == "of_another":
        request.json({"request_id": "rwq_1", "results": wrong})
    elif fault == "no_json":
        request.json({"request_id": request_id, "results": wrong}, content_type="text/html")
    else:
        request.json({"request_id": request_id, "results": results}, copies=2)


def rewards_of(url: str, **fields: Any) -> Rewards:
    component = {
        "name": "hash", "url": url, "batch": {"max_samples": 4, "linger_ms": 0},
        "retry": {"attempts": 6, "base": 0.01, "cap": 0.02}, "limits": {"concurrency": 4},
        "timeouts": {"attempt": 20, "read": 20, "deadline": 120},
    } | fields.pop("component", {})  # fmt: skip
    return Rewards.model_validate({"components": [component], **fields})


class Failing:
    """Cannot score the first completions of some prompts, those of the step's first round."""

    def __init__(
        self,
        *,
        prompts: tuple[str, ...],
        indices: tuple[int, ...],
        again: bool = False,
        count: int = 12,
    ) -> None:
        self._prompts, self._indices, self._again = prompts, indices, again
        self._count = count

    def __call__(self, request: ScoreRequest) -> bool:
        send(
            request,
            [
                self._failed(one["id"]) if self._fails(sample) else one
                for sample, one in zip(request.samples, results_of(request), strict=True)
            ],
        )
        return True

    def _fails(self, sample: dict[str, Any]) -> bool:
        is_named = sample["prompt"] in self._prompts and sample["index"] in self._indices
        return is_named and (self._again or int(sample["group_id"][1:]) < self._count)

    def _failed(self, name: str) -> dict[str, Any]:
        error = {"code": "judge_lost", "message": "gone", "retryable": False}
        return {"id": name, "error": error}

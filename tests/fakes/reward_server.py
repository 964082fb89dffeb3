"""The fake reward service of the tests, and the manners that most of them need."""

import time
from collections.abc import Callable
from typing import Any, ClassVar

import orjson

from fakes.loopback import LoopbackServer, Manner, Request


class ScoreRequest(Request):
    """A request of ``dar.reward.v1``."""

    server: "RewardServer"

    @property
    def request_id(self) -> str:
        return str(self.content["request_id"])

    @property
    def samples(self) -> list[dict[str, Any]]:
        return list(self.content["samples"])

    @property
    def ids(self) -> list[str]:
        return [sample["id"] for sample in self.samples]

    def rewards(self, rewards: list[Any]) -> None:
        """A conforming answer in the short form."""
        self.json({"request_id": self.request_id, "rewards": rewards})

    def results(self, results: list[dict[str, Any]]) -> None:
        """An answer in the long form."""
        self.json({"request_id": self.request_id, "results": results})

    def fine(self) -> None:
        """The right reward of every sample."""
        self.rewards([self.server.reward(sample) for sample in self.samples])

    def accept(self, **more: Any) -> None:
        """Promise the rewards for later."""
        self.json({"request_id": self.request_id, "status": "accepted", **more}, "202 Accepted")


class RewardServer(LoopbackServer):
    """A reward service; without manners it conforms."""

    request_type: ClassVar[type[Request]] = ScoreRequest

    def __init__(
        self,
        *manners: Manner,
        reward: Callable[[dict[str, Any]], Any] = lambda _: 0.5,
        **options: Any,
    ) -> None:
        self.reward = reward
        super().__init__(*(manners or (fine,)), path="score", **options)


def fine(request: ScoreRequest) -> None:
    request.fine()


def hang(request: Request) -> None:
    request.hang()


def status(code: int | str, body: bytes = b"", **headers: str) -> Manner:
    """Answer with a status and bytes that are no JSON."""
    return lambda request: request.answer(body, code, "text/plain", **headers)


def scoring(reward: Callable[[dict[str, Any], int], Any]) -> Manner:
    """Each sample gets ``reward(sample, its place)``."""
    return lambda request: request.rewards(
        [reward(sample, place) for place, sample in enumerate(request.samples)]
    )


def accept(**more: Any) -> Manner:
    return lambda request: request.accept(**more)


# --- rewards that come later ----------------------------------------------------------------------


def result_of(request: ScoreRequest, *rewards: float, **more: Any) -> bytes:
    """What a callback or a poll brings."""
    return orjson.dumps({"request_id": request.request_id, "rewards": rewards, **more})


Poll = Callable[[ScoreRequest, ScoreRequest], None]
"""Answers a poll; it is given the poll and the request that was accepted."""


class Later:
    """The manner of a service that accepts, and answers the polls that follow in turn."""

    def __init__(self, poll_url: str | None, *polls: Poll) -> None:
        self.poll_url = poll_url
        self._turns = list(polls)
        self.polls: list[ScoreRequest] = []
        self.times: list[float] = []
        self.posts: list[ScoreRequest] = []

    def __call__(self, request: ScoreRequest) -> None:
        if request.method == "POST":
            self.posts.append(request)
            request.accept(**({} if self.poll_url is None else {"poll_url": self.poll_url}))
            return
        self.polls.append(request)
        self.times.append(time.monotonic())
        turn = self._turns.pop(0) if len(self._turns) > 1 else self._turns[0]
        turn(request, self.posts[-1])


def not_yet(poll: ScoreRequest, _: ScoreRequest) -> None:
    poll.answer(b"{}", "202 Accepted")


def ready(poll: ScoreRequest, post: ScoreRequest) -> None:
    poll.answer(result_of(post, 1, 2, 3, 4))

"""What reward services do that answer later, for the scripted servers of these tests."""

import time
from collections.abc import Callable
from typing import Any

import orjson


def accept(**more: Any) -> Callable[[Any], None]:
    def behave(request: Any) -> None:
        content = {"request_id": request.content["request_id"], "status": "accepted", **more}
        request.answer(orjson.dumps(content), status="202 Accepted")

    return behave


def result_of(request: Any, *rewards: float, **more: Any) -> bytes:
    return orjson.dumps({"request_id": request.content["request_id"], "rewards": rewards, **more})


class Judge:
    """A service that accepts, and answers the polls that follow in turn."""

    def __init__(self, poll_url: str | None, *polls: Callable[[Any, Any], None]) -> None:
        self.poll_url = poll_url
        self.polls = list(polls)
        self.asked: list[Any] = []
        self.times: list[float] = []
        self.posts: list[Any] = []

    def __call__(self, request: Any) -> None:
        if request.line.startswith("POST"):
            self.posts.append(request)
            accept(**({} if self.poll_url is None else {"poll_url": self.poll_url}))(request)
            return
        self.asked.append(request)
        self.times.append(time.monotonic())
        turn = self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]
        turn(request, self.posts[-1])


def not_yet(request: Any, _: Any) -> None:
    request.answer(b"{}", status="202 Accepted")


def ready(request: Any, post: Any) -> None:
    request.answer(result_of(post, 1, 2, 3, 4))

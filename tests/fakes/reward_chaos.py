"""Rewards that come late, and a reward service on loopback whose manners can be spoiled; a reward is a function of its completion."""

import asyncio
import contextlib
import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from dar.protocol.reward_spec import Rewards

if TYPE_CHECKING:  # importing torch takes seconds, which whoever needs the service alone is spared
    from dar.training import DARTrainer

WIDE = {"per_device_train_batch_size": 12, "dar_k": 4, "max_new_tokens": 5, "learning_rate": 1e-2}
"""48 completions: three parts."""

Manners = Callable[["Request"], bool]
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


class Request(BaseHTTPRequestHandler):
    """One attempt."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["content-length"]))
        self.content = json.loads(self.body)
        server: Any = self.server
        with server.lock:
            server.requests.append(self.content)
        if not server.manners(self):
            self.fine()

    def results(self) -> list[dict[str, Any]]:
        return [
            {"id": sample["id"], "reward": reward_of(sample["completion"])}
            for sample in self.content["samples"]
        ]

    def fine(self, results: list[dict[str, Any]] | None = None) -> None:
        """What a service should answer, in any order."""
        found = self.results() if results is None else results
        random.shuffle(found)
        self.send({"request_id": self.content["request_id"], "results": found})

    def send(self, content: object, status: int = 200, *, copies: int = 1, **headers: str) -> None:
        """Answer; another ``content_type`` and more headers may be given."""
        body = json.dumps(content).encode()
        given = {"content_type": "application/json", "content_length": str(len(body)), **headers}
        lines = [f"HTTP/1.1 {status} Status"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in given.items()]
        with contextlib.suppress(OSError):
            self.wfile.write(("\r\n".join([*lines, "", ""]).encode() + body) * copies)

    def accept(self) -> None:
        """Take the request, whose results are there when they are asked for."""
        server: Any = self.server
        request_id = self.content["request_id"]
        with server.lock:
            server.later[request_id] = self.results()
        content = {"request_id": request_id, "status": "accepted", "poll_url": f"/{request_id}"}
        self.send(content, 202)

    def do_GET(self) -> None:
        server: Any = self.server
        request_id = self.path[1:]
        with server.lock:
            results = server.later[request_id]
            random.shuffle(results)
        self.send({"request_id": request_id, "results": results})

    def reset(self) -> None:
        """Leave without a word."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has given up is no news."""


class Service:
    """The service, while it is open."""

    def __init__(self, manners: Manners = lambda _: False) -> None:
        self._server: Any = _Server(("127.0.0.1", 0), Request)
        self._server.manners = manners
        self._server.lock = threading.Lock()
        self._server.requests = []
        self._server.later = {}
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/score"

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Every attempt's body."""
        return list(self._server.requests)

    @contextlib.contextmanager
    def open(self) -> Iterator["Service"]:
        thread = threading.Thread(target=lambda: self._server.serve_forever(0.01), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


PASSING = ("503", "429", "reset", "hang")
BROKEN = ("short", "long", "text", "not_a_number", "an_id_twice", "of_another", "no_json", "twice")


class Chaos:
    """Up to two passing faults, or one broken answer, before each request is answered; answers come late and in any order.

    A request that allows it is sometimes answered later, to a poll.
    """

    def __init__(self, hang_seconds: float) -> None:
        self._random = random.Random(5)
        self._left: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self._hang_seconds = hang_seconds
        self.met: list[str] = []

    def __call__(self, request: Request) -> bool:
        with self._lock:
            left = self._left.setdefault(request.content["request_id"], self._draw())
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
            request.accept()
        return bool(fault) or is_later

    def _fail(self, request: Request, fault: str) -> None:
        if fault == "503":
            request.send({}, 503)
        elif fault == "429":
            request.send({}, 429, retry_after="0")
        elif fault == "reset":
            request.reset()
        else:
            time.sleep(self._hang_seconds)
            request.close_connection = True

    def _draw(self) -> list[str]:
        """What the next new request meets, the last one first: a broken answer every third time, so that all of them occur."""
        number = len(self._left)
        if number % 3 == 0:
            return [BROKEN[number // 3 % len(BROKEN)]]
        return self._random.choices(PASSING, k=self._random.randrange(3))


def _break(request: Request, fault: str) -> None:
    """Answer in a way that no reward may be taken from, but for those of an answer that is only sent twice."""
    results, request_id = request.results(), request.content["request_id"]
    wrong = [{"id": one["id"], "reward": 0.5} for one in results]
    if fault == "short":
        request.fine(wrong[1:])
    elif fault == "long":
        request.fine([*wrong, {"id": "s9999", "reward": 0.5}])
    elif fault == "text":
        request.fine([{**one, "reward": "0.5"} for one in results])
    elif fault == "not_a_number":
        request.fine([*wrong[1:], {**wrong[0], "reward": float("nan")}])
    elif fault == "an_id_twice":
        request.fine([wrong[0], *wrong[:-1]])
    elif fault == "of_another":
        request.send({"request_id": "rwq_1", "results": wrong})
    elif fault == "no_json":
        request.send({"request_id": request_id, "results": wrong}, content_type="text/html")
    else:
        request.send({"request_id": request_id, "results": results}, copies=2)


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

    def __call__(self, request: Any) -> bool:
        request.fine(
            [
                self._failed(one["id"]) if self._fails(sample) else one
                for sample, one in zip(request.content["samples"], request.results(), strict=True)
            ]
        )
        return True

    def _fails(self, sample: dict[str, Any]) -> bool:
        is_named = sample["prompt"] in self._prompts and sample["index"] in self._indices
        return is_named and (self._again or int(sample["group_id"][1:]) < self._count)

    def _failed(self, name: str) -> dict[str, Any]:
        error = {"code": "judge_lost", "message": "gone", "retryable": False}
        return {"id": name, "error": error}

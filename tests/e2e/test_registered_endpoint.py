"""A job with a registered reward endpoint: its secret signs, its header is sent, and neither stays anywhere."""

import base64
import json
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dar.rewards.signing import decode_secret, verify


class Judge:
    """A reward service that gives out rewards to those alone who show its secrets."""

    def __init__(self) -> None:
        self.secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        self.token = f"Bearer {secrets.token_hex(16)}"
        self.accepted = 0
        self.refused: list[str] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status, answer = judge.answer(
                    {name.lower(): value for name, value in self.headers.items()}, body
                )
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def answer(self, headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        try:
            verify([decode_secret(self.secret)], headers, body)
            assert headers.get("authorization") == self.token
        except Exception as error:  # noqa: BLE001 - whatever is wrong, the test shows it
            self.refused.append(repr(error))
            return 401, {"seen": headers.get("authorization")}
        asked = json.loads(body)
        self.accepted += 1
        rewards = [float(sample["completion"].count("e")) for sample in asked["samples"]]
        return 200, {"request_id": asked["request_id"], "rewards": rewards}

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def judge() -> Iterator[Judge]:
    made = Judge()
    yield made
    made.close()


@pytest.mark.slow  # a whole job is trained
def test_a_job_is_scored_with_the_secrets_of_its_endpoint_and_they_stay_nowhere(
    installation: Any, judge: Judge, reviews_base: Path
) -> None:
    client = installation.client
    endpoint = client.reward_endpoints.create(
        "judge", judge.url, headers={"authorization": judge.token}, signing_secret=judge.secret
    )
    file_id = client.files.create(reviews_base / "prompts.jsonl").id
    rewards = {"components": [{"name": "letters", "endpoint": endpoint.id}]}
    spec = installation.spec(file_id, hyperparameters={"max_steps": 2}, rewards=rewards)
    job = installation.until_done(client.jobs.create(**spec).id)
    assert (job.status, judge.refused) == ("succeeded", [])
    assert judge.accepted >= 2
    assert client.reward_endpoints.stats(endpoint.id).jobs == {"succeeded": 1}
    wanted = [judge.secret, judge.secret.removeprefix("whsec_"), judge.token.split()[1]]
    for path in installation.home.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [text for text in wanted if text.encode() in content], path

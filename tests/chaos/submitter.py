"""Clients that submit jobs, retry what fails, and write down what was acknowledged."""

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2

from chaos.stack import Stack
from service.audit import Acknowledged

CLIENTS = 4
GIVE_UP_SECONDS = 120.0
TWICE = 0.1
"""Share of the submissions that a client with a key sends again though it saw the answer."""


class Submitter:
    """Submits jobs, numbered from 0.

    Args:
        stack: Where they go; a client takes the next replica at each try.
        has_keys: Whether clients send an ``Idempotency-Key``. Otherwise they count their retries,
            as the OpenAI client does.
        seed: Of what is sent twice.
        **script: See `Stack.spec`.
    """

    def __init__(self, stack: Stack, *, has_keys: bool, seed: int = 0, **script: object) -> None:
        self._stack, self._has_keys, self._script = stack, has_keys, script
        self._random = random.Random(seed)
        self._replicas = itertools.cycle(range(len(stack.ports)))
        self._lock = threading.Lock()
        self.acknowledged: list[Acknowledged] = []
        self.retries = 0

    def run(self, count: int) -> None:
        """Submit ``count`` jobs.

        Raises:
            TimeoutError: One was not accepted in time.
        """
        twice = [self._random.random() < TWICE for _ in range(count)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            done = [pool.submit(self._submit, n, is_twice=twice[n]) for n in range(count)]
            for one in done:
                one.result()

    def _submit(self, number: int, *, is_twice: bool) -> None:
        for _ in range(2 if is_twice and self._has_keys else 1):
            job_id = self._until_accepted(number)
            with self._lock:
                self.acknowledged.append(Acknowledged(job_id, str(number)))

    def _until_accepted(self, number: int) -> str:
        body = json.dumps(self._stack.spec(number, **self._script)).encode()
        for retry in self._tries():
            headers = {**self._stack.headers, "content-type": "application/json"}
            headers["x-stainless-retry-count"] = str(retry)
            if self._has_keys:
                headers["idempotency-key"] = f"number-{number}"
            with self._lock:
                replica = next(self._replicas)
                self.retries += retry > 0
            try:
                answer = httpx2.post(
                    f"{self._stack.url(replica)}/v1/fine_tuning/jobs",
                    content=body,
                    headers=headers,
                    timeout=10,
                    trust_env=False,
                )
            except httpx2.HTTPError:
                continue
            if answer.is_success:
                return str(answer.json()["id"])
            if answer.status_code < 500 and answer.status_code not in {409, 429}:
                raise RuntimeError(f"submission {number} was refused: {answer.text}")
        raise TimeoutError(f"submission {number} was not accepted in {GIVE_UP_SECONDS:.0f} s")

    @staticmethod
    def _tries() -> Iterator[int]:
        give_up = time.monotonic() + GIVE_UP_SECONDS
        for retry in itertools.count():
            yield retry
            if time.monotonic() > give_up:
                return
            time.sleep(min(1.0, 0.1 * 2**retry) * random.uniform(0.5, 1.0))

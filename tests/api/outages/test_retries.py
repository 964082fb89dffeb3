"""One call of a client makes one job, however often and in whatever order it is sent."""

import threading
from typing import Any

from fakes.live_service import Live

PATH = "/v1/fine_tuning/jobs"


def test_a_try_and_its_retries_make_one_job_in_any_order_and_at_once(live: Live) -> None:
    file_id = live.upload().json()["id"]

    def post(seed: int, number: int) -> Any:
        headers = {"x-stainless-retry-count": str(number)} if number else {}
        spec = live.spec(training_file=file_id, seed=seed)
        return live.http.post(PATH, json=spec, headers=headers)

    for seed, order in enumerate([(0, 1, 2), (2, 0, 1)]):
        answers = [post(seed, number) for number in order]
        assert len({answer.json()["id"] for answer in answers}) == 1
        replayed = [answer.headers.get("idempotency-replayed") for answer in answers]
        assert replayed == [None, "inferred", "inferred"]
        meant = post(seed, 0)
        assert "idempotency-replayed" not in meant.headers
        assert meant.json()["id"] != answers[0].json()["id"]

    together: list[Any] = []
    threads = [
        threading.Thread(target=lambda number=number: together.append(post(7, number)))
        for number in (0, 1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in together] == [200] * 3
    assert len({answer.json()["id"] for answer in together}) == 1
    assert len(live.http.get(PATH).json()["data"]) == 2 + 2 + 1

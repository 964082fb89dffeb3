"""Samples of a job by their prompt, reward and flag, and one by its id."""

from collections.abc import Callable
from typing import Any

import pytest

from dar.client import Client
from dar.errors import NotFoundError
from dar.protocol.samples import prompt_id_of
from fakes.live_service import SAMPLE, Live

BAD = [
    ("flag=odd", "flag", "literal_error"),
    ("order=odd", "order", "literal_error"),
    ("group=-1", "group", "greater_than_equal"),
    ("min_reward=nan", "min_reward", "finite_number"),
    ("min_reward=x", "min_reward", "float_parsing"),
    ("min_reward=2&max_reward=1", "min_reward", "invalid_range"),
    ("prompt_id=" + "x" * 25, "prompt_id", "string_too_long"),
    ("prompt=hi", "prompt", "unknown_parameter"),
    ("after=sample-x", "after", "invalid_cursor"),
    ("after=sample-99", "after", "invalid_cursor"),
]


def test_samples_are_listed_by_what_they_are_and_one_is_retrieved(live: Live) -> None:
    job_id, lease = live.running()
    cut = {**SAMPLE, "group": 1, "prompt": "ho", "finish_reason": "length", "reward": -1.0}
    none = {**cut, "index": 1, "reward": None, "reward_status": "error", "finish_reason": "stop"}
    lease.say({"type": "samples", "step": 1, "samples": [none, SAMPLE, cut]})
    ho = prompt_id_of("ho")
    with Client(live.key("api_key"), live.url) as client:
        listed = list(client.jobs.samples(job_id, order="group", limit=1))
        assert [(one.group, one.index) for one in listed] == [(0, 0), (1, 0), (1, 1)]
        assert [one.flags for one in listed] == [[], ["truncated"], ["error", "unscored"]]
        assert [one.prompt_id for one in listed] == [prompt_id_of("hi"), ho, ho]
        assert list(client.jobs.samples(job_id, prompt_id=ho, flag="truncated")) == [listed[1]]
        assert list(client.jobs.samples(job_id, group=1, order="asc")) == listed[:0:-1]
        assert list(client.jobs.samples(job_id, min_reward=0.5)) == listed[:1]
        assert list(client.jobs.samples(job_id, max_reward=0.5)) == listed[1:2]
        assert client.jobs.sample(job_id, listed[2].id) == listed[2]
        for odd in ("sample-99", "sample-x", "x"):
            with pytest.raises(NotFoundError, match=odd):
                client.jobs.sample(job_id, odd)
        other = live.submit()["id"]
        with pytest.raises(NotFoundError, match=other):
            client.jobs.sample(other, listed[0].id)


@pytest.mark.parametrize(("query", "param", "code"), BAD)
def test_bad_input_is_refused(
    live: Live, error_of: Callable[..., dict[str, Any]], query: str, param: str, code: str
) -> None:
    job_id = live.submit()["id"]
    answer = live.http.get(f"/v1/fine_tuning/jobs/{job_id}/samples?{query}")
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param
    assert code in {error["code"], *(problem["code"] for problem in error["errors"])}

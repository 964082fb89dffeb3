"""When rewards stop coming in mid-training, the last whole step is kept, and the failure is
reported.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dar.errors import RewardBudgetError, RewardError
from dar.protocol.metrics import is_known
from dar.rewards.server import reward_server
from dar.training.from_spec import JobInputs, train_job
from dar.training.report.sink import NullControl
from fakes import loopback
from fakes.recording_sink import RecordingSink
from fakes.reward_server import RewardServer, ScoreRequest

SECRET = "whsec_" + "A" * 43 + "="
GROUPS = 3


class Judge:
    """A reward service that breaks after so many groups, until it is mended."""

    def __init__(self) -> None:
        self.breaks_after: int | None = None
        self.groups = 0

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        self.groups += len(completions) // 4
        if self.breaks_after is not None and self.groups > self.breaks_after:
            raise RuntimeError("out of order")
        return [text.split().count("w40") / 8 for text in completions]


@pytest.fixture
def judge() -> Judge:
    return Judge()


@pytest.fixture
def url(judge: Judge) -> Iterator[str]:
    def function(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        return judge(prompts, completions, **columns)

    app = reward_server(secret=SECRET)(function)
    with loopback.serving(app) as url:
        yield f"{url}/score"


@pytest.fixture
def job(job_inputs: Callable[..., JobInputs], tmp_path: Path, url: str) -> Callable[..., JobInputs]:
    def make(name: str, **fields: Any) -> JobInputs:
        retry = {"attempts": 2, "base": 0.01}
        component = {"name": "words", "url": url, "normalize": "running", "retry": retry}
        dar = {"rewards": {"components": [component]}, "checkpointing": {"every_steps": 100}}
        values = {"steps": 5, "work_dir": tmp_path / name, "reward_secret": SECRET}
        return job_inputs(dar, **values | fields)

    return make


def test_an_outage_after_some_steps_keeps_them_and_the_job_ends_as_if_nothing_had_been(
    job: Callable[..., JobInputs],
    judge: Judge,
    new_sink: type[RecordingSink],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "dar.rewards.scoring.normalize.WARM_UP", 10
    )  # what rewards are scaled by is kept too
    whole, broken, mended = new_sink(), new_sink(), new_sink()
    # Another job: the reward server remembers what it has answered to this one.
    train_job(job("whole", job_id="ftjob-0"), whole, NullControl())
    judge.groups, judge.breaks_after = 0, 3 * GROUPS
    with pytest.raises(RewardBudgetError, match=r"after step 3: .*HTTP 500") as caught:
        train_job(job("broken"), broken, NullControl())
    assert (caught.value.error_code, caught.value.is_outage) == ("reward_unavailable", True)
    assert [step for step, *_ in broken.published] == [3]
    step, requests, failures = broken.requests[-1]
    assert step == 4
    assert {request.outcome for request in requests} == {"http_5xx"}
    assert {(failed.code, failed.attempts) for failed in failures} == {("http_500", 2)}
    kinds = [(data or {}).get("kind") for _, _, data in broken.events]
    assert kinds.count("reward_error") == 1
    judge.breaks_after = None
    resumed = job("mended", resume_from=broken.published[0][1])
    assert train_job(resumed, mended, NullControl()) == "finished"
    one, two = (load_file(s.published[-1][1] / "model.safetensors") for s in (whole, mended))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {**broken.deterministic_reports(), **mended.deterministic_reports()} == (
        whole.deterministic_reports()
    )


def test_every_step_tells_its_requests_and_samples(
    job: Callable[..., JobInputs], sink: RecordingSink
) -> None:
    train_job(job("whole"), sink, NullControl())
    assert [step for step, *_ in sink.requests] == [1, 2, 3, 4, 5]
    for values in sink.reports.values():
        assert all(map(is_known, values))
        assert (values["reward_requests/n_valid"], values["reward_requests/n_error"]) == (12, 0)
        assert values["reward_requests/words/requests"] >= 1
        assert (
            values["reward_requests/words/retries"]
            == values["reward_requests/words/failed_requests"]
            == 0
        )
        assert (
            0
            < values["reward_requests/words/p50_seconds"]
            <= values["reward_requests/words/p95_seconds"]
        )
        low, high = values["rewards/words/min"], values["rewards/words/max"]
        assert low <= values["rewards/words/mean"] <= high


@pytest.mark.parametrize("ending", ["outage", "rejection", "samples"])
def test_a_job_that_ends_within_its_first_step_counts_its_requests_and_failures(
    job_inputs: Callable[..., JobInputs], tmp_path: Path, sink: RecordingSink, ending: str
) -> None:
    def answer(request: ScoreRequest) -> None:
        if ending == "samples":
            error = {"code": "judge", "message": "no"}
            request.results([{"id": name, "error": error} for name in request.ids])
        else:
            request.answer(b"no", 503 if ending == "outage" else 403, "text/plain")

    with RewardServer(answer) as server:
        component = {"name": "words", "url": server.url, "retry": {"attempts": 2, "base": 0.01}}
        dar = {"rewards": {"components": [component]}}
        inputs = job_inputs(dar, steps=5, work_dir=tmp_path / "job", reward_secret=SECRET)
        with pytest.raises(RewardError):
            train_job(inputs, sink, NullControl())
    assert sink.reports == {}, "an unfinished step has no metrics"
    counts = sink.unfinished
    assert counts is not None
    assert all(map(is_known, counts))
    assert counts["reward_requests/words/requests"] >= 1
    assert counts["reward_requests/n_error"] >= 4
    assert counts.get("reward_requests/n_valid", 0) == 0
    family = {"outage": "http_5xx", "rejection": "http_4xx", "samples": "other"}[ending]
    assert counts[f"reward_requests/n_error/{family}"] == counts["reward_requests/n_error"]
    failed = counts["reward_requests/words/failed_requests"]
    assert failed == (0 if ending == "samples" else counts["reward_requests/words/requests"])

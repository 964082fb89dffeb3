"""Metrics over HTTP and through the SDK: charts, deltas, tables, names, comparisons, tags."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dar.client import Client
from fakes.live_service import Lease, Live

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
ROUTE = "/v1/fine_tuning/jobs/{}/metrics"


def step(number: int, **values: float | None) -> dict[str, Any]:
    named = {f"dar/{name}": value for name, value in values.items()}
    return {"type": "metrics", "step": number, "values": named}


def long_job(live: Live, slot: str = "0", steps: int = 400) -> tuple[str, Lease]:
    """A job that reported steps with a peak at 77, and evaluated every 100 steps."""
    job_id = live.submit(dar={"hyperparameters": {"max_steps": 2000}})["id"]
    lease = live.claim(slot)
    assert lease is not None
    rows = [
        step(n, rewards_mean=9.5 if n == 77 else n / 1000, loss=None if n == 5 else 1 / n)
        for n in range(1, steps + 1)
    ]
    for row in rows[99::100]:
        row["values"]["eval_dar/rewards_mean"] = row["step"] / 100
    assert lease.say(*rows).status_code == 200
    return job_id, lease


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(api_key=live.key("api_key"), base_url=live.url) as client:
        yield client


def test_a_chart_keeps_the_peaks_and_says_its_resolution(live: Live, client: Client) -> None:
    job_id, _ = long_job(live)
    chart = client.jobs.metrics(job_id, max_points=50)
    assert chart.resolution == 32
    assert all(len(points.step) <= 50 for points in chart.series.values())
    rewards = chart.series["dar/rewards_mean"]
    assert rewards.step == sorted(rewards.step)
    assert dict(zip(rewards.step, rewards.value, strict=True))[77] == 9.5
    assert chart.series["eval_dar/rewards_mean"].value == [1.0, 2.0, 3.0, 4.0]
    whole = client.jobs.metrics(job_id)
    assert (whole.resolution, len(whole.series["dar/loss"].step)) == (1, 400)
    assert client.jobs.metrics(job_id, max_points=400).series == whole.series
    part = client.jobs.metrics(job_id, max_points=400, from_step=390).series["dar/loss"]
    assert part.step == list(range(390, 401))


def test_a_delta_has_new_steps_alone_also_as_a_chart(live: Live, client: Client) -> None:
    job_id, lease = long_job(live)
    seen = client.jobs.metrics(job_id, max_points=100)
    assert client.jobs.metrics(job_id, max_points=100, after=seen.cursor).series == {}
    lease.say(*[step(n, loss=float(n)) for n in range(401, 650)])
    newer = client.jobs.metrics(job_id, after=seen.cursor)
    assert newer.series["dar/loss"].step == list(range(401, 650))
    chart = client.jobs.metrics(job_id, after=seen.cursor, max_points=20)
    points = chart.series["dar/loss"]
    assert (chart.resolution, points.step[0], points.step[-1]) == (32, 401, 649)
    assert len(points.step) <= 20
    assert client.jobs.metrics(job_id, after=newer.cursor).series == {}


def test_a_delta_after_a_rewind_says_where_to_go_back_to(live: Live) -> None:
    job_id, first = live.running(dar={"hyperparameters": {"max_steps": 1000}})
    first.say(*[step(n, loss=1.0) for n in range(1, 41)])
    first.checkpoint(20)
    cursor = live.job(job_id, "/metrics")["cursor"]
    second = live.claim(incarnation="life-2")
    assert second is not None
    assert live.job(job_id, "/metrics", after=cursor, max_points=10)["rewound_to"] == 20
    second.say(*[step(n, loss=2.0) for n in range(21, 61)])
    newer = live.job(job_id, "/metrics", after=cursor)
    assert newer["rewound_to"] == 20
    assert newer["series"]["dar/loss"]["value"] == [2.0] * 40
    assert "rewound_to" not in live.job(job_id, "/metrics", after=newer["cursor"])
    chart = live.job(job_id, "/metrics", max_points=2)["series"]["dar/loss"]
    assert sorted(chart["value"]) == [1.0, 2.0]
    table = live.http.get(ROUTE.format(job_id), params={"format": "csv", "after": cursor})
    assert table.headers["x-dar-rewound-to"] == "20"


def test_tables_have_a_line_for_each_point(live: Live, client: Client) -> None:
    job_id, _ = long_job(live, steps=6)
    rows = list(csv.DictReader(io.StringIO(client.jobs.export_metrics(job_id, names="dar/loss"))))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert (rows[1]["name"], rows[1]["value"], rows[4]["value"]) == ("dar/loss", "0.5", "")
    lines = client.jobs.export_metrics(job_id, format="jsonl", max_points=2).splitlines()
    points = [json.loads(line) for line in lines]
    assert {point["name"] for point in points} == {"dar/loss", "dar/rewards_mean"}
    assert set(points[0]) == {"name", "step", "value", "at"}
    answer = live.http.get(ROUTE.format(job_id), params={"format": "csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["x-dar-cursor"] == live.job(job_id, "/metrics")["cursor"]


def test_a_job_says_which_metrics_it_has(live: Live, client: Client) -> None:
    job_id, lease = long_job(live)
    lease.say({"type": "metrics", "step": 401, "values": {"time/reward/letters/p50_seconds": 0.5}})
    named = {metric.name: metric for metric in client.jobs.metric_names(job_id)}
    assert list(named) == sorted(named)
    assert (named["dar/rewards_mean"].min, named["dar/rewards_mean"].max) == (0.001, 9.5)
    assert named["dar/loss"].unit == "nats"
    assert named["eval_dar/rewards_mean"].meaning.startswith("on the validation file: mean reward")
    assert named["reward_requests/letters/p50_seconds"].unit == "s"
    fresh = live.submit()["id"]
    assert client.jobs.metric_names(fresh) == []


def test_jobs_are_compared_in_one_response(
    live: Live, client: Client, error_of: Callable[..., Any]
) -> None:
    (first, lease), (second, _) = long_job(live), long_job(live, "1", steps=40)
    found = client.jobs.compare_metrics([second, first], names="dar/loss", max_points=10)
    assert [one.job_id for one in found] == [second, first]
    assert [one.resolution for one in found] == [16, 128]
    assert list(found[0].series) == ["dar/loss"]
    path, params = "/v1/fine_tuning/metrics", {"ids": f"{first},{second}", "max_points": 10}
    answer = live.http.get(path, params=params)
    known = {"if-none-match": answer.headers["etag"]}
    assert live.http.get(path, params=params, headers=known).status_code == 304
    lease.say(step(401, loss=0.1))
    assert live.http.get(path, params=params, headers=known).status_code == 200
    absent = live.http.get(path, params={"ids": f"{first},ftjob-absent"})
    assert (absent.status_code, error_of(absent)["code"]) == (404, "not_found")
    for wrong in ("", ",", ",".join(f"ftjob-{n}" for n in range(21))):
        refused = live.http.get(path, params={"ids": wrong})
        assert error_of(refused)["code"] == "invalid_ids", wrong


def test_a_comparison_has_a_bound_without_a_number_of_points_and_with_one(
    live: Live, client: Client, error_of: Callable[..., Any]
) -> None:
    job_id, lease = long_job(live)
    for first in (401, 751):
        rows = [step(n, loss=1.0) for n in range(first, first + 350)]
        assert lease.say(*rows).status_code == 200
    whole = client.jobs.metrics(job_id, names="dar/loss").series["dar/loss"].value
    [chart] = client.jobs.compare_metrics([job_id], names="dar/loss")
    assert len(whole) > 1000 >= len(chart.series["dar/loss"].value)
    assert chart.resolution > 1
    ids = ",".join([job_id, live.submit()["id"], live.submit()["id"]])
    params = {"ids": ids, "max_points": 100_000}
    refused = live.http.get("/v1/fine_tuning/metrics", params=params)
    assert (refused.status_code, error_of(refused)["param"]) == (400, "max_points")


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_a_text_is_sent_in_parts(live: Live, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    job_id, _ = long_job(live, steps=6)
    params = {"format": format, "names": "dar/loss"}
    whole = live.http.get(ROUTE.format(job_id), params=params).content
    monkeypatch.setattr("service.api.metrics.LINES", 2)
    answer = live.http.get(ROUTE.format(job_id), params=params)
    assert answer.content == whole
    assert whole.count(b"\n") == 6 + (format == "csv")
    assert "content-length" not in answer.headers


def test_a_tag_among_several_is_known(live: Live) -> None:
    job_id, lease = long_job(live, steps=3)
    path = ROUTE.format(job_id)
    tag = live.http.get(path).headers["etag"]
    for sent in (tag, f'"other", {tag}', tag.removeprefix("W/"), "*"):
        answer = live.http.get(path, headers={"if-none-match": sent})
        assert (answer.status_code, answer.content) == (304, b""), sent
        assert answer.headers["etag"] == tag
    lease.say(step(4, loss=1.0))
    assert live.http.get(path, headers={"if-none-match": tag}).status_code == 200


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"max_points": "1"}, "max_points"),
        ({"max_points": "100001"}, "max_points"),
        ({"max_points": "many"}, "max_points"),
        ({"format": "xml"}, "format"),
        ({"format": "csv", "rewound": "true"}, "rewound"),
        ({"from_step": "9", "to_step": "8", "max_points": "10"}, "from_step"),
        ({"names": "dar/nothing", "format": "csv"}, "names"),
        ({"points": "10"}, "points"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    live: Live, error_of: Callable[..., Any], params: dict[str, str], param: str
) -> None:
    job_id = live.submit()["id"]
    answer = live.http.get(ROUTE.format(job_id), params=params)
    assert answer.status_code == 400
    error = error_of(answer)
    assert param in {error["param"], *(one["param"] for one in error["errors"])}


def test_the_examples_of_the_page_run(
    live: Live, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job_id, _), (other_id, _) = long_job(live), long_job(live, "1")
    section = re.split(r"^## ", PAGE.partition("\n## Metrics\n")[2], flags=re.MULTILINE)[0]
    names = {"JOB": job_id, "OTHER": other_id, "DAR_URL": live.url}
    names |= {"DAR_API_KEY": live.key("api_key"), "OPENAI_API_KEY": live.key("api_key")}
    names["OPENAI_BASE_URL"] = f"{live.url}/v1"
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {"client": client, "job": client.jobs.retrieve(job_id)}
    known["other"] = client.jobs.retrieve(other_id)
    python = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(python) >= 6
    for block in python:
        exec(block, known)
    shell = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    assert len(shell) >= 4
    if shutil.which("curl") is not None:
        told = [
            subprocess.run(
                ["bash", "-euc", block],
                check=True,
                capture_output=True,
                text=True,
                env={"PATH": os.defpath, **names},
            ).stdout
            for block in shell
        ]
        assert json.loads(told[0])["series"]["dar/loss"]["step"][0] == 100
        assert told[1].strip() == "304"
        assert Path("metrics.csv").read_text().startswith("name,step,value,at")
        assert [one["job_id"] for one in json.loads(told[3])["data"]] == [job_id, other_id]

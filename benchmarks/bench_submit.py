"""How long a submission takes, and how long until a worker has the job."""

import json
import sqlite3
import statistics
import time
from pathlib import Path

from stack import Stack, report, stack

SUBMISSIONS = 200
CLAIMS = 8


def make_model(stack: Stack) -> None:
    """A folder that passes for a model; no trainer gets as far as reading it."""
    folder = stack.home / "models" / "nothing"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def submit(stack: Stack, file_id: str) -> str:
    """Submit a job; returns its id."""
    component = {"name": "none", "url": "http://127.0.0.1:61999/score"}
    method = {"type": "dar", "dar": {"rewards": {"components": [component]}}}
    return stack.client.jobs.create(model="nothing", training_file=file_id, method=method).id


def submissions() -> list[float]:
    """Seconds of each submission by one client, without a worker."""
    with stack(workers=0) as running:
        make_model(running)
        file_id = running.client.files.create(
            b'{"prompt": "The soup was"}\n', filename="one.jsonl"
        ).id
        seconds = []
        for _ in range(SUBMISSIONS):
            started = time.perf_counter()
            submit(running, file_id)
            seconds.append(time.perf_counter() - started)
        return seconds


def claims() -> list[float]:
    """Seconds from a job's row to its claim, by the service's clock, with an idle worker."""
    with stack(workers=1) as running:
        make_model(running)
        file_id = running.client.files.create(
            b'{"prompt": "The soup was"}\n', filename="one.jsonl"
        ).id
        time.sleep(5)  # the worker is up and waits
        for _ in range(CLAIMS):
            job_id = submit(running, file_id)
            running.client.jobs.wait(job_id)
            time.sleep(1)  # the worker is idle again
        return read_claims(running.home / "dar.db")


def read_claims(database: Path) -> list[float]:
    """Seconds between each job's creation and its first attempt."""
    query = """
        select (julianday(attempts.started_at) - julianday(jobs.created_at)) * 86400
        from attempts join jobs on jobs.id = attempts.job_id where attempts.number = 1
    """
    with sqlite3.connect(database) as connection:
        return [row[0] for row in connection.execute(query)]


def main() -> None:
    """Measure and report."""
    submit_seconds, claim_seconds = submissions(), claims()
    report(
        "submit",
        submit_p50_ms=round(statistics.median(submit_seconds) * 1e3, 1),
        submit_p95_ms=round(statistics.quantiles(submit_seconds, n=20)[-1] * 1e3, 1),
        claimed_p50_ms=round(statistics.median(claim_seconds) * 1e3, 1),
        claimed_max_ms=round(max(claim_seconds) * 1e3, 1),
        submissions=SUBMISSIONS,
        claims=len(claim_seconds),
    )


if __name__ == "__main__":
    main()

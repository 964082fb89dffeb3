"""A job whose reward services fail before they answer ends with the weights that it has with
perfect ones, to the last bit.

The test is slow because it trains two whole jobs, and a trainer spends some six CPU seconds on
importing torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from dar.protocol.metrics import is_reproducible
from fakes import reward_chaos as chaos
from fakes.installation import Installation

SERVICES, STEPS, GROUPS, K = 4, 3, 6, 4
"""So few requests go to each service that no breaker opens and no retry has to wait for its
turn."""
KEPT = ("step", "group", "index", "completion", "reward", "components", "advantage", "weight")


def component(url: str, number: int) -> dict[str, Any]:
    return {
        "name": f"hash{number}",
        "url": f"{url}/{number}",
        "weight": 1 / (1 + number),
        "batch": {"max_samples": GROUPS * K, "linger_ms": 2000},
        "retry": {"attempts": 6, "base": 0.01, "cap": 0.02},
        "timeouts": {"attempt": 1.5, "deadline": 120},
    }


@pytest.fixture
def train(
    installation: Installation, reviews_base: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """What comes of a job whose services have some manners: files of the last checkpoint, metrics
    and samples.
    """
    client = installation.client

    def run(manners: Callable[[Any], bool]) -> dict[str, Any]:
        with chaos.service(manners) as service:
            components = [component(service.url, number) for number in range(SERVICES)]
            spec = installation.spec(
                client.files.create(reviews_base / "prompts.jsonl").id,
                hyperparameters={"max_steps": STEPS, "batch_size": GROUPS},
                rewards={"components": components},
            )
            # A dry run would be among those that meet the faults.
            job_id = client.jobs.create(**spec, skip_validation=True).id
            job = installation.until_done(job_id)
        assert (job.status, job.error) == ("succeeded", None)
        checkpoint = next(iter(client.checkpoints.list(job_id)))
        assert checkpoint.step_number == STEPS
        client.checkpoints.download(
            job_id, checkpoint.id, tmp_path / job_id, include_optimizer=True
        )
        return {
            "files": {
                name: load_file(tmp_path / job_id / name)
                for name in ("model.safetensors", "resume/optimizer.safetensors")
            },
            "metrics": {
                name: (one.step, one.value)
                for name, one in client.jobs.metrics(job_id).series.items()
                if is_reproducible(name)
            },
            "samples": [
                [getattr(row, name) for name in KEPT]
                for row in client.jobs.samples(job_id, order="asc", limit=100)
            ],
            "stats": client.jobs.reward_stats(job_id),
        }

    return run


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(240)
def test_chaos_changes_no_bit_of_a_job(train: Callable[..., Any]) -> None:
    spoiled = chaos.Chaos(hang_seconds=3.0)
    perfect, chaotic = train(lambda _: False), train(spoiled)
    for name, tensors in perfect["files"].items():
        assert tensors.keys() == chaotic["files"][name].keys()
        assert all((tensors[key] == chaotic["files"][name][key]).all() for key in tensors), name
    assert perfect["samples"] == chaotic["samples"]
    assert {step for step, *_ in perfect["samples"]} == {1, 2, 3}
    assert perfect["metrics"] == chaotic["metrics"]
    faults = [fault for fault in spoiled.met if fault]
    assert len(faults) >= SERVICES
    assert set(faults) & set(chaos.PASSING)
    assert set(faults) & set(chaos.BROKEN)
    retries = sum(one.retries for one in chaotic["stats"].components)
    assert 0 < retries <= len(faults), "a reset of a used connection costs no attempt"
    assert (chaotic["stats"].rewards, chaotic["stats"].errors) == (STEPS * GROUPS * K, 0)

"""The token with which a worker loads gated models: where it comes from and may be."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dar.cli.up import WITHHELD_FROM_SERVICE
from dar.errors import ConfigurationError
from dar.settings import environment, load_settings
from fakes import tiny_models
from fakes.hub import Hub, files_in
from fakes.scripted_installation import ScriptedInstallation
from worker.supervisor.child_process import trainer_environment

TOKEN = "hf_9XkQ2vRbW7mLpZt4"
REPOSITORIES = frozenset({"team/policy", "team/judge", "datasets/team/rows"})
LINES = b'{"prompt": "w10 w20"}\n{"prompt": "w30"}\n{"prompt": "w5 w6 w7"}\n'


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"HF_TOKEN": "hf_b"}, "hf_b"),
        ({"HF_TOKEN": "hf_b", "DAR_HF_TOKEN": " hf_a\n"}, "hf_a"),
        ({"HF_TOKEN": "hf_b", "DAR_HF_TOKEN": ""}, None),
    ],
    ids=str,
)
def test_the_token_is_a_setting_that_comes_before_that_of_the_hubs_library(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
) -> None:
    for name in ("DAR_HF_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    token = load_settings().hf_token
    assert (None if token is None else token.get_secret_value()) == expected
    assert expected is None or expected not in repr(load_settings())


def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DAR_HF_TOKEN", "hf_one hf_two")
    with pytest.raises(ConfigurationError, match="has a space, a line break") as refused:
        load_settings()
    assert "hf_one" not in refused.value.message


def test_neither_a_trainer_nor_the_service_of_dar_up_has_the_token_in_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("DAR_HF_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    assert TOKEN not in trainer_environment(None, 1, is_offline=False).values()
    assert TOKEN not in environment(WITHHELD_FROM_SERVICE).values()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub whose repositories are all gated."""
    policy = tiny_models.save(tiny_models.policy(), tmp_path / "policy")
    judge = tiny_models.save(tiny_models.judge(pad_token_id=1), tmp_path / "judge")
    repositories = {
        "team/policy": files_in(policy),
        "team/judge": files_in(judge),
        "datasets/team/rows": {"train.jsonl": LINES},
    }
    with Hub(repositories, gated=REPOSITORIES, readers={TOKEN: REPOSITORIES}) as server:
        yield server


def shown_by(process: psutil.Process) -> str:
    """What every user of the machine, or of the account, can read of a process."""
    return "\0".join([*process.cmdline(), *process.environ().values()])


@pytest.mark.slow  # a real attempt of two processes, each of which imports torch
def test_a_job_of_gated_repositories_is_trained_and_the_token_stays_nowhere(
    installation: ScriptedInstallation,
    hub: Hub,
    reward_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    worker = installation.start_worker(real=True, hf_token=TOKEN, log_level="debug")
    judge = {"name": "judge", "kind": "hf_model", "model": "team/judge"}
    dar = {
        "hyperparameters": {"max_steps": 4, "batch_size": 2, "dar_k": 2, "kl_budget": None},
        "sampling": {"max_new_tokens": 6},
        "rewards": {"components": [judge, {"name": "r", "url": reward_url}]},
        "checkpointing": {"every_steps": 1},
        "resources": {"processes": 2},
    }
    rows = "hf://team/rows?split=train"
    job_id = installation.submit_spec(LINES, dar, model="team/policy", training_file=rows)
    trainers = installation.until(
        lambda: found if len(found := installation.trainers()) == 2 else None, seconds=90
    )
    others = psutil.Process(worker.pid).children(recursive=True)
    assert not any(TOKEN in shown_by(process) for process in [*trainers, *others])
    assert TOKEN not in " ".join(psutil.Process(worker.pid).cmdline())

    assert not any("HF_TOKEN" in process.environ() for process in trainers)
    assert all(process.environ()["HF_HUB_OFFLINE"] == "1" for process in trainers)

    job = installation.wait(job_id, "succeeded", "failed", seconds=120)
    assert job["status"] == "succeeded", job["error"]
    assert hub.asked().keys() == {(name, TOKEN) for name in REPOSITORIES}
    [worker_now] = installation.api("GET", "/workers")["data"]
    assert {"team/policy", "team/judge"} <= set(worker_now["models"])
    assert (tmp_path / "hf" / "hub").is_dir()
    stored = [*installation.home.rglob("*"), *tmp_path.rglob("*")]
    holding = [path for path in stored if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert holding == []
    assert TOKEN not in str([job, installation.messages(job_id)])

"""Data sets of a hub, against a local server that answers as the hub does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol.hub_data import HubData
from dar.protocol.spec import JobSpec
from dar.training.data.hub import load_hub_rows
from dar.training.data.rows import check_rows
from dar.training.from_spec import JobInputs, training_rows
from fakes.hub import Hub, use_hub

ROWS = b'{"prompt": "w10", "answer": "a"}\n{"prompt": "w20", "answer": "b"}\n'


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A hub with one data set, ``owner/data``, of one file."""
    with Hub({"datasets/owner/data": {"train.jsonl": ROWS}}) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path)
        yield


def test_a_split_of_a_data_set_is_loaded_as_the_rows_of_a_job(hub: None, tmp_path: Path) -> None:
    rows: Any = load_hub_rows(HubData.parse("hf://owner/data?split=train"))
    assert [rows[index] for index in range(len(rows))] == [
        {"prompt": "w10", "answer": "a"},
        {"prompt": "w20", "answer": "b"},
    ]
    check_rows(rows)
    spec = JobSpec.model_validate(
        {
            "model": "tiny",
            "training_file": "hf://owner/data",
            "method": {"type": "dar", "dar": {"hyperparameters": {"max_steps": 1}}},
        }
    )
    inputs = JobInputs(
        job_id="ftjob-1",
        spec=spec,
        seed=1,
        total_steps=1,
        model="tiny",
        adapters=(),
        training_file=None,
        work_dir=tmp_path,
        resume_from=None,
        reward_secret=None,
        threads=1,
        offline=False,
    )
    assert len(training_rows(inputs)) == 2


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (
            "hf://owner/none",
            "the hub does not have .*'owner/none' .*keeps it private; check the name",
        ),
        ("hf://owner/data?split=nope", "Unknown split"),
        ("hf://owner/data?config=nope", "BuilderConfig 'nope' not found"),
    ],
)
def test_what_the_hub_does_not_have_is_the_users_error(hub: None, address: str, says: str) -> None:
    with pytest.raises(TrainingError, match=says) as caught:
        load_hub_rows(HubData.parse(address))
    assert caught.value.param == "training_file"


def test_a_machine_that_may_not_ask_the_hub_says_so(hub: None) -> None:
    with pytest.raises(TrainingError, match="this process may not call the hub"):
        load_hub_rows(HubData("owner/data"), is_offline=True)


@pytest.mark.parametrize(
    "address",
    [
        "hf://owner",
        "hf://owner/data/more",
        "hf://owner/data?rows=3",
        "hf://a/b?split=",
        "hf://../b",
    ],
)
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="write hf://owner/name"):
        HubData.parse(address)

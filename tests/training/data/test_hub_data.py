"""Data sets of a hub, against a local server that answers as the hub does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol.hub_data import HubData
from dar.protocol.spec import JobSpec
from dar.training.data.hub import load_hub_rows
from dar.training.data.rows import check_rows
from dar.training.from_spec import JobInputs, training_rows

ROWS = b'{"prompt": "w10", "answer": "a"}\n{"prompt": "w20", "answer": "b"}\n'
COMMIT = "b" * 40


class Hub(BaseHTTPRequestHandler):
    """Has one data set, ``owner/data``, of one file; anything else is not found."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith(f"/tree/{COMMIT}"):
            file = {"type": "file", "path": "train.jsonl", "size": len(ROWS), "oid": "a" * 40}
            self._answer(200, json.dumps([file]).encode())
        elif path in ("/api/datasets/owner/data", f"/api/datasets/owner/data/revision/{COMMIT}"):
            about = {"id": "owner/data", "sha": COMMIT, "siblings": [{"rfilename": "train.jsonl"}]}
            self._answer(200, json.dumps(about).encode())
        elif path == f"/datasets/owner/data/resolve/{COMMIT}/train.jsonl":
            self._answer(200, ROWS, ETag='"abc"', X_Repo_Commit=COMMIT)
        else:
            is_known = "/owner/data" in path
            self._answer(404, b"{}", X_Error_Code="EntryNotFound" if is_known else "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    for module, name, value in (
        (constants, "ENDPOINT", url),
        (
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        ),
        (constants, "HF_HUB_CACHE", str(tmp_path / "hub")),
        (constants, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_ENDPOINT", url),
        (datasets.config, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets"),
    ):
        monkeypatch.setattr(module, name, value)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


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
        ("hf://owner/none", "'owner/none' .*cannot be loaded.*doesn't exist on the Hub"),
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

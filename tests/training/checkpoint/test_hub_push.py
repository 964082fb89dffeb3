"""Models on the hub: which files arrive there, and what they say.

The hub is a local server that speaks its HTTP API.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import hub as transformers_hub

from dar.errors import InvalidRequestError, TrainingError
from dar.training import DARTrainer
from fakes.recording_sink import RecordingSink

TOKEN = "hf_localtoken"

# huggingface_hub 2.4 uploads by a form of call that httpx2 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


class Hub(ThreadingHTTPServer):
    """What the hub does with a model repository: make it, take files, show which it has."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.broken_commits = 0
        """How many commits are refused before one is taken."""


class HubRequest(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, 401)
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            return self._answer(self._create(json.loads(body)))
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._answer(self._batch(json.loads(body)))
        if parts[-2] == "preupload":
            return self._answer(self._modes(json.loads(body)))
        assert parts[-2] == "commit", self.path
        return self._commit("/".join(parts[2:4]), parts[-1], body)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        assert (
            self.headers.get("authorization") is None
        )  # the address is signed; a token is not for it
        assert self.path == f"/lfs/{hashlib.sha256(content).hexdigest()}"
        self.server.blobs[self.path.removeprefix("/lfs/")] = content
        self._answer({})

    def _create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        self.server.created.append(wanted)
        repository = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        self.server.files.setdefault(repository, {})
        return {"url": f"{self.server.url}/{repository}"}

    def _modes(self, wanted: dict[str, Any]) -> dict[str, Any]:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        return {
            "files": [
                {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False}
                for file in wanted["files"]
            ]
        }

    def _batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {
            "transfer": "basic",
            "objects": [
                file | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{file['oid']}"}}}
                for file in wanted["objects"]
            ],
        }

    def _commit(self, repository: str, revision: str, body: bytes) -> None:
        if self.server.broken_commits:
            self.server.broken_commits -= 1
            return self._answer({"error": "You have no right to write here"}, 403)
        summary = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "lfsFile":
                self.server.files[repository][value["path"]] = self.server.blobs[value["oid"]]
            else:
                assert (line["key"], value["encoding"]) == ("file", "base64")
                content = base64.b64decode(value["content"])
                self.server.files[repository][value["path"]] = content
        self.server.commits.append((repository, revision, summary))
        oid = f"{len(self.server.commits):040d}"
        url = f"{self.server.url}/{repository}/commit/{oid}"
        return self._answer(
            {"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": None}
        )

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    # What the variables HF_ENDPOINT and HF_HUB_DISABLE_XET say, which are read when the library is
    # imported.
    monkeypatch.setattr(transformers_hub, "_hf_api", HfApi(endpoint=server.url))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


MODEL_FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip
ADAPTER_FILES = MODEL_FILES - {"config.json", "generation_config.json", "model.safetensors"} | {
    "adapter_config.json",
    "adapter_model.safetensors",
}


def saved_in(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_saved_model_is_loaded_by_from_pretrained_and_says_what_it_is(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    tmp_path: Path,
) -> None:
    model = make_model()
    model.config._name_or_path = model.name_or_path = "someone/base-model"
    trainer = train(model=model, settings={"max_steps": 1, "dar_k": 3, "alpha": 0.05})
    trainer.save_model()
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == MODEL_FILES
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    AutoTokenizer.from_pretrained(out)
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "someone/base-model"
    assert card.data.library_name == "transformers"
    assert {"dar", "alignment", "generated_from_trainer"} <= set(card.data.tags or ())
    for expected in ("2504.14177", "share_of_w40", "| `alpha` | `0.05` |", "| `dar_k` | `3` |"):
        assert expected in card.text
    assert "dar/rewards_mean" in card.text
    assert model.model_tags == ["dar", "alignment"]


def test_a_card_names_no_folder_as_base_model(
    train: Callable[..., DARTrainer], make_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    model = make_model()
    model.name_or_path = str(tmp_path)
    trainer = train(model=model, settings={"max_steps": 1})
    trainer.create_model_card(
        model_name="Short",
        dataset=["a/b", str(tmp_path)],
        tags="mine",
        license="mit",
        language="en",
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.datasets) == (None, ["a/b"])
    assert (card.data.license, card.data.language) == ("mit", "en")
    assert "mine" in (card.data.tags or ())
    assert str(tmp_path) not in card.content
    assert card.text.lstrip().startswith("# Short")


def test_a_pushed_model_can_be_loaded_and_nothing_else_is_pushed(
    train: Callable[..., DARTrainer], hub: Hub, tmp_path: Path
) -> None:
    settings = {
        "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "hub_model_id": "team/pleased",
        "hub_token": TOKEN, "hub_private_repo": True,
    }  # fmt: skip
    trainer = train(settings=settings)
    (tmp_path / "out" / "notes.json").write_text('{"private": true}')
    assert not hub.created
    info = trainer.push_to_hub("First try", dataset="trl-lib/ultrafeedback-prompt")
    assert hub.created[0]["organization"] == "team"
    assert "private" in json.dumps(hub.created[0])
    assert hub.commits == [("team/pleased", "main", "First try")]
    assert info.commit_url.startswith(f"{hub.url}/team/pleased")
    assert hub.files["team/pleased"].keys() == MODEL_FILES
    pushed = saved_in(tmp_path / "pushed", hub.files["team/pleased"])
    loaded = AutoModelForCausalLM.from_pretrained(pushed).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in trainer.model.state_dict().items())
    card = ModelCard.load(pushed / "README.md")
    assert card.data.datasets == ["trl-lib/ultrafeedback-prompt"]
    assert "# pleased" in card.text


def test_every_checkpoint_goes_to_the_hub_without_what_only_a_resume_needs(
    train: Callable[..., DARTrainer], hub: Hub, tmp_path: Path
) -> None:
    settings = {
        "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1,
        "push_to_hub": True, "hub_model_id": "team/adapter", "hub_always_push": True,
        "hub_token": TOKEN, "hub_revision": "trial",
    }  # fmt: skip
    peft = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = train(settings=settings, peft_config=peft)
    names = [f"Training in progress, step {step}" for step in (1, 2)]
    assert hub.commits == [("team/adapter", "trial", name) for name in names]
    assert hub.files["team/adapter"].keys() == ADAPTER_FILES
    newest = (trainer.checkpoints / "step-2" / "adapter_model.safetensors").read_bytes()
    assert hub.files["team/adapter"]["adapter_model.safetensors"] == newest
    card = ModelCard(hub.files["team/adapter"]["README.md"].decode())
    assert card.data.library_name == "peft"
    assert "PeftModel.from_pretrained(base, folder)" in card.text
    # What was staged for the uploads is gone.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoints"}


def test_whole_checkpoints_are_pushed_only_when_asked_for(
    train: Callable[..., DARTrainer], hub: Hub, tmp_path: Path
) -> None:
    settings = {
        "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True,
        "hub_model_id": "whole", "hub_always_push": True, "hub_token": TOKEN,
        "hub_strategy": "checkpoint",
    }  # fmt: skip
    train(settings=settings)
    prefix = "last-checkpoint/"
    files = {
        name.removeprefix(prefix): content
        for name, content in hub.files["me/whole"].items()
        if name.startswith(prefix)
    }
    assert {"MANIFEST.json", "resume/optimizer.safetensors"} <= files.keys()
    assert hub.files["me/whole"].keys() - {prefix + name for name in files} == MODEL_FILES
    # It is a checkpoint like any other: a run goes on from it.
    folder = saved_in(tmp_path / "step-2", files)
    again = train(resume=folder, settings={**settings, "push_to_hub": False})
    assert again.state.global_step == 2


def test_a_failed_push_is_said_and_does_not_end_training(
    train: Callable[..., DARTrainer], hub: Hub, sink: RecordingSink
) -> None:
    hub.broken_commits = 1
    settings = {
        "max_steps": 1, "save_strategy": "steps", "push_to_hub": True, "hub_model_id": "team/x",
        "hub_token": TOKEN,
    }  # fmt: skip
    trainer = train(settings=settings, sink=sink)
    assert trainer.state.global_step == 1
    messages = [message for _, message, _ in sink.events]
    assert any("step 1 did not reach the hub: " in m and "no right" in m for m in messages)
    hub.broken_commits = 1
    with pytest.raises(TrainingError, match=r"'team/x' cannot be (?s:.*) can be pushed later"):
        trainer.push_to_hub()


def test_with_the_strategy_end_only_save_model_pushes(
    train: Callable[..., DARTrainer], hub: Hub
) -> None:
    settings = {
        "max_steps": 1, "save_strategy": "steps", "push_to_hub": True, "hub_model_id": "team/x",
        "hub_token": TOKEN, "hub_strategy": "end",
    }  # fmt: skip
    trainer = train(settings=settings)
    assert not hub.commits
    trainer.save_model()
    assert hub.commits == [("team/x", "main", "Model save")]


def test_a_wrong_token_is_refused_before_anything_is_trained(
    train: Callable[..., DARTrainer], hub: Hub
) -> None:
    with pytest.raises(
        TrainingError, match=r"(?s)pushed to the hub: .*401.*; nothing was trained;"
    ):
        train(settings={"push_to_hub": True, "hub_model_id": "team/x", "hub_token": "hf_other"})
    with pytest.raises(InvalidRequestError, match="save_only_model"):
        train(settings={"save_only_model": True})

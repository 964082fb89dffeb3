"""The examples about files, checkpoints and models in docs/api.md run against a service."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar import Client
from fakes.live_service import Live

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()


def test_the_examples_about_files_run(documented: Callable[..., None]) -> None:
    documented("Files and uploads")


def test_the_examples_about_checkpoints_and_models_run(
    live: Live, documented: Callable[..., None]
) -> None:
    job_id, lease = live.running()
    checkpoint_id = lease.checkpoint(4)
    ended = lease.post("/complete", last_seq=lease.seq, checkpoint_id=checkpoint_id)
    assert ended.status_code == 200, ended.text
    client = Client()
    url = f"{client.base_url}/v1"
    given = {"client": client, "job": client.jobs.retrieve(job_id)}
    documented("Checkpoints and models", **given, url=url, key=live.key("api_key"))
    assert Path("weights/model.safetensors").read_bytes() == b"weights"
    assert Path("model/model.safetensors").read_bytes() == b"weights"
    assert Path("model.safetensors").read_bytes() == b"weights"


@pytest.fixture
def documented(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the examples of a section one after the other, as a reader would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAR_API_KEY", live.key("api_key"))
    monkeypatch.setenv("DAR_BASE_URL", live.url)
    Path("prompts.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "ho"}\n')

    def run(title: str, **names: Any) -> None:
        section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        blocks = re.findall(r"^```(python|bash)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        assert {language for language, _ in blocks} == {"python", "bash"}
        for language, text in blocks:
            if language == "python":
                exec(text, names)
            else:
                run_shell(text, live, names)
        names["client"].close()

    return run


def run_shell(text: str, live: Live, names: dict[str, Any]) -> None:
    known = {"FILE": "file", "JOB": "job", "CHECKPOINT": "checkpoint"}
    ids = {variable: names[name].id for variable, name in known.items() if name in names}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", text.replace("curl -s", "curl -S --fail-with-body -s")],
        env={
            "PATH": os.defpath,
            "DAR_URL": live.url,
            "DAR_API_KEY": live.key("api_key"),
            **ids,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (text, done.stdout, done.stderr)

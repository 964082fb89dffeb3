"""The examples about jobs in docs/api.md run, with a model and a reward service of this machine."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from fakes.live_service import Judge, Live

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
SECTION = PAGE.partition("\n## Jobs")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`(openai\.fine_tuning[^`]*)`", SECTION)


def test_the_examples_about_jobs_run(
    live: Live, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as a reader would run them."""
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert INLINE
    model = live.settings.home / "models" / "my-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAR_API_KEY", live.key("api_key"))
    monkeypatch.setenv("DAR_BASE_URL", live.url)
    Path("prompts.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "ho"}\n')
    names: dict[str, Any] = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(text.replace("http://127.0.0.1:9000/score", judge.url), names)
        else:
            run_shell(text, live, names)
    names["openai"] = OpenAI(api_key=live.key("api_key"), base_url=f"{live.url}/v1")
    for call in INLINE:
        assert eval(call, names) is not None, call
    names["client"].close()


def run_shell(text: str, live: Live, names: dict[str, Any]) -> None:
    Path("spec.json").write_text(json.dumps(names["spec"]))
    job_id = names["job"].id if "job" in names else ""
    variables = {"DAR_URL": live.url, "DAR_API_KEY": live.key("api_key"), "JOB": job_id}
    done = subprocess.run(
        ["bash", "-ec", text.replace("curl -s", "curl -sS --fail-with-body")],
        env={"PATH": os.defpath, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (text, done.stdout, done.stderr)

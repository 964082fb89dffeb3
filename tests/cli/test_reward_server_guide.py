"""docs/rewards-server.md is so: its function and command run, its JSON is what comes, its tables
are complete.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from jsonschema import Draft202012Validator

from dar.cli.reward.main import reward_app
from dar.rewards.base import Failed, RewardContext, RewardSample, Scored, Skipped
from dar.rewards.functions import as_results
from dar.rewards.scoring.scorer import scorer_from_functions
from dar.rewards.server.options import CheckedOptions, ServerOptions
from dar.settings import environment

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "rewards-server.md").read_text()
SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def rows(heading: str) -> list[list[str]]:
    """The rows of the table that begins with a heading."""
    lines = GUIDE.split(f"| {heading} |", 1)[1].splitlines()[2:]
    table = lines[: next(n for n, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[Any]:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(home=folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_its_function_is_served_by_its_command_which_prints_its_json(tmp_path: Path) -> None:
    (function,), (command,), (component, _) = blocks("python"), blocks(""), blocks("json")
    (tmp_path / "my_rewards.py").write_text(function)
    (tmp_path / "reward_secret").write_text(SECRET)
    words = command.split()
    assert words[:3] == ["dar", "reward", "serve"]
    start = [sys.executable, "-m", "dar.cli", *words[1:], "--port", "0"]
    with running(start, tmp_path) as process:
        printed = json.loads(process.stdout.readline())
        url = printed["url"]
        shown = json.loads(component)
        assert {**printed, "url": re.sub(r":\d+/", ":9000/", url)} == shown
        with scorer_from_functions(url, secret=SECRET) as scorer:
            sample = RewardSample("s0", "g0", 0, "p", None, "four", "stop", 1)
            assert scorer.score([sample], RewardContext(1))[0].reward == -0.04


def test_its_promise_is_one() -> None:
    schema = json.loads((DOCS / "schemas" / "dar.reward.v1.accepted.json").read_text())
    Draft202012Validator(schema).validate(json.loads(blocks("json")[1].replace("…", "x")))


def test_every_option_is_there_with_its_flag_and_default() -> None:
    described: set[str] = set()
    flags: set[str] = set()
    for names, flag, default, _ in rows("option"):
        options = re.findall(r"`(\w+)`", names)
        described |= set(options)
        flags |= set(re.findall(r"`(--[\w-]+)`", flag))
        if len(options) == 1 and default.isdigit():
            value = getattr(CheckedOptions(), options[0])
            assert (0 if value is None else value) == float(default), options[0]
    assert described == set(ServerOptions.__annotations__)
    command = typer.main.get_command(reward_app).commands["serve"]  # type: ignore[attr-defined] # it is a group
    known = {name for parameter in command.params for name in parameter.opts}
    beside = {"target", "--host", "--port", "--insecure"}
    assert flags == known - beside


@pytest.mark.parametrize(("number", "kind"), [(0, Scored), (2, Scored), (3, Skipped), (4, Failed)])
def test_an_entry_means_what_it_says(number: int, kind: type) -> None:
    text = rows("entry")[number][0]
    entry = 0.7 if text == "a number" else ast.literal_eval(text.strip("`").replace("…", "x"))
    (result,) = as_results([entry], 1, "it")
    assert type(result) is kind
    if isinstance(result, Failed):
        assert (result.code, result.is_transient) == ("judge_timeout", True)

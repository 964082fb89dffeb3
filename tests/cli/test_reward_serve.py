"""``dar reward serve``: a function of the current folder as a reward service, and one clear line
where it cannot be.
"""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dar.rewards.base import RewardContext, RewardSample
from dar.rewards.scoring.scorer import scorer_from_functions
from dar.settings import environment
from fakes.command_line import run_command

SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MODULE = """
NUMBER = 7

def brevity(prompts, completions, **columns):
    return [-len(text) / 100 for text in completions]

def odd(prompts):
    return []
"""
APPLICATION = """
from my_rewards import brevity
from dar.rewards.server import reward_server

app = reward_server(brevity)
"""
SAMPLE = RewardSample("s0", "g0", 0, "p", None, "four", "stop", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "my_app.py").write_text(APPLICATION)
    (tmp_path / "broken.py").write_text("\n1 / 0\n")
    (tmp_path / "lacking.py").write_text("import no_such_library\n")
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    (tmp_path / "bad_secret").write_text(f"{SECRET}\nwhsec_x")
    (tmp_path / "no_secret").write_text("\n")
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dar.cli", "reward", "serve", *arguments],
            cwd=folder,
            env=environment(home=folder / "home"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        with process:  # waits, and closes its pipes
            pass


def announced(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def ended(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return errors


@pytest.mark.parametrize("way", ["a file", "the installation's secret"])
def test_a_function_is_served_and_its_component_can_be_pasted(
    start: Any, folder: Path, way: str
) -> None:
    if way == "a file":
        process = start("my_rewards:brevity", "--port", "0", "--secret-file", "secret")
    else:
        (folder / "home" / "reward_secret").write_text(SECRET)
        process = start("my_rewards:brevity", "--port", "0")
    component = announced(process)
    assert (component["name"], set(component)) == ("brevity", {"name", "url"})
    assert component["url"].endswith("/score")
    with scorer_from_functions(component["url"], secret=SECRET) as scorer:
        assert scorer.score([SAMPLE], RewardContext(1))[0].reward == -0.04
    errors = ended(process)
    assert f"Serving brevity at {component['url']}" in errors
    assert "NO SECRET" not in errors


def test_options_reach_the_server(start: Any) -> None:
    process = start(
        "my_rewards:brevity",
        "--port",
        "0",
        "--insecure",
        "--path",
        "/mine",
        "--answer-within",
        "30",
    )
    component = announced(process)
    assert component["url"].endswith("/mine")
    assert component["reply"] == "either"
    with scorer_from_functions(component["url"]) as scorer:
        assert scorer.score([SAMPLE], RewardContext(1))[0].reward == -0.04
    assert "NO SECRET" in ended(process)


def test_an_application_brings_its_own_options(start: Any) -> None:
    process = start("my_app:app", "--port", "0")
    component = announced(process)
    with scorer_from_functions(component["url"]) as scorer:
        assert scorer.score([SAMPLE], RewardContext(1))[0].reward == -0.04
    ended(process)


REFUSED = [
    (
        ["my_rewards.py:brevity"],
        2,
        "names a file, but must be module:function; run it in",
    ),
    (["./a/judge.py"], 2, "and give judge:function"),
    (["my_rewards:brevity", "--insecure", "--path", "/a/../b"], 1, "without . and .. as parts"),
    (["nothing:brevity"], 2, "module nothing is neither in"),
    (["my_rewards"], 2, "not of the form module:function"),
    (["my_rewards:nothing"], 2, "my_rewards has no nothing; it defines brevity, odd"),
    (["my_rewards:NUMBER"], 2, "my_rewards:NUMBER is of the type int, not a function"),
    (["my_app:app", "--max-calls", "2"], 2, "pass them to reward_server"),
    (["broken:brevity"], 2, "ZeroDivisionError: division by zero"),
    (["lacking:brevity"], 2, "No module named 'no_such_library'"),
    (["my_rewards:brevity"], 2, "or use --insecure"),
    (
        ["my_rewards:brevity", "--insecure", "--secret-file", "secret"],
        2,
        "use this option or --insecure",
    ),
    (["my_rewards:brevity", "--secret-file", "absent"], 1, "absent cannot be read: No such file"),
    (
        ["my_rewards:brevity", "--secret-file", "bad_secret"],
        1,
        "bad_secret, line 2: a reward secret",
    ),
    (["my_rewards:brevity", "--secret-file", "no_secret"], 1, "no_secret is empty, but must hold"),
    (["my_rewards:odd", "--insecure"], 1, "has no parameter named completions"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSED)
def test_what_cannot_be_served_is_said_in_words(
    folder: Path, arguments: list[str], code: int, message: str
) -> None:
    done = run_command(
        "reward",
        "serve",
        *arguments,
        environment=environment(home=folder / "home"),
        folder=folder,
    )
    assert done.returncode == code
    said = " ".join(done.stderr.replace("│", " ").split())
    assert message in said
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_port_in_use_is_said_so(start: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("my_rewards:brevity", "--insecure", "--port", str(port))
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert f"cannot listen on 127.0.0.1:{port}" in errors
    assert "Traceback" not in errors


def test_what_must_be_installed_is_said(folder: Path) -> None:
    program = (
        "import sys; sys.modules['starlette'] = None\n"
        "sys.argv = ['dar', 'reward', 'serve', 'my_rewards:brevity', '--insecure']\n"
        "from dar.cli.main import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "pip install -c constraints.txt '.[rewards]'" in result.stderr
    assert "Traceback" not in result.stderr

"""``dar reward check``: its output and its exit code."""

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dar.cli.main import main
from dar.protocol.reward_probe import ProbeReport
from dar.rewards.http.signing import decode_secret, verify
from dar.settings import environment
from fakes.command_line import Ended, run_command
from fakes.reward_server import RewardServer, ScoreRequest

SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
DEAD = "http://127.0.0.1:61999/score"
Run = Callable[..., Ended]


class Service:
    """A reward service that checks signatures; ``answer`` may be replaced."""

    def __init__(self) -> None:
        self.url = ""
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, bytes]] = self.rewards

    def __call__(self, request: ScoreRequest) -> None:
        status, content = self.take(request.headers, request.body)
        request.answer(content, status)

    def take(self, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        self.seen.append((headers, json.loads(body)))
        try:
            verify([decode_secret(SECRET)], headers, body)
        except Exception:  # noqa: BLE001 - a test's service: whatever is wrong with the signature
            return 401, b'{"error": "not signed by us"}'
        return self.answer(json.loads(body))

    def rewards(self, asked: dict[str, Any]) -> tuple[int, bytes]:
        rewards = [len(sample["completion"]) / 100 for sample in asked["samples"]]
        return 200, json.dumps({"request_id": asked["request_id"], "rewards": rewards}).encode()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    with RewardServer(made) as server:
        made.url = server.url
        yield made


@pytest.fixture
def check(tmp_path: Path) -> Run:
    (tmp_path / "reward_secret").write_text(SECRET + "\n")

    def run(*arguments: str) -> Ended:
        given = {**environment(home=tmp_path), "COLUMNS": "100"}
        return run_command("reward", "check", *arguments, environment=given)

    return run


def lines_of(output: str) -> list[str]:
    return [" ".join(line.split()) for line in output.splitlines()]


def test_a_good_service_is_good_and_gets_settings_to_paste(check: Run, service: Service) -> None:
    done = check(service.url, "--concurrency", "3", "--max-samples", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Good: no errors, no warnings." in done.stdout
    lines = lines_of(done.stdout)
    for number in range(1, 9):
        assert any(line.startswith(f"{number} ") and " ok " in line for line in lines)
    pasted = done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1]
    assert json.loads(pasted)["batch"] == {"max_samples": 5}
    assert max(len(asked["samples"]) for _, asked in service.seen) == 5


def test_a_broken_service_is_not_usable_and_the_output_says_what_to_do(
    check: Run, service: Service
) -> None:
    service.answer = lambda asked: (
        200,
        json.dumps({"request_id": asked["request_id"], "rewards": [1]}).encode(),
    )
    done = check(service.url)
    assert done.returncode == 1
    text = " ".join(done.stdout.split())
    assert "2 answer fail contract.length: 1 rewards for 2 samples" in text
    assert "→ Return one reward for each sample, in their order." in text
    assert "It answered HTTP 200:" in text
    assert "3-9 determinism … later results skipped an earlier step failed" in text
    assert "Not usable" in text


def test_a_refused_connection_is_one_line_and_advice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dar.cli", "reward", "check", DEAD, "--unsigned"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**environment(home=tmp_path), "COLUMNS": "100"},
        check=False,
    )
    text = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "1 address fail connect: connection refused → Check that the service is running" in text
    assert "Traceback" not in done.stdout + done.stderr


def test_warnings_leave_a_service_usable(check: Run, service: Service) -> None:
    service.answer = lambda asked: (
        200,
        json.dumps(
            {"request_id": asked["request_id"], "rewards": [0.5] * len(asked["samples"])}
        ).encode(),
    )
    done = check(service.url)
    assert done.returncode == 0
    assert "Usable, with 1 warning." in done.stdout
    assert "spread.constant" in done.stdout


def test_the_report_as_json_is_that_of_the_service(check: Run, service: Service) -> None:
    done = check(service.url, "--light", "--json")
    report = ProbeReport.model_validate_json(done.stdout)
    assert report.ok
    assert [step.status for step in report.steps] == ["ok"] * 4 + ["skipped"] * 5
    assert SECRET not in done.stdout


def test_headers_samples_and_columns_are_sent(check: Run, service: Service, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    rows = [
        {"prompt": "2+2?", "completion": text, "ground_truth": 4, "columns": {"level": "easy"}}
        for text in ("4\u2028\x85\u2029", "5")
    ]
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    samples.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    token = tmp_path / "token"
    token.write_text("Bearer abcdef123456\n")
    headers = ("--header", f"authorization=@{token}", "--header", "x-kind=test")
    done = check(service.url, "--light", "--json", "--samples", str(samples), *headers)
    assert done.returncode == 0, done.stdout + done.stderr
    sent, asked = service.seen[0]
    assert (sent["authorization"], sent["x-kind"]) == ("Bearer abcdef123456", "test")
    assert [sample["completion"] for sample in asked["samples"]] == ["4\u2028\x85\u2029", "5"]
    assert asked["samples"][0]["columns"] == {"level": "easy"}
    assert "abcdef123456" not in done.stdout


def test_without_its_secret_a_service_refuses_and_the_output_names_the_option(
    check: Run, service: Service
) -> None:
    done = check(service.url, "--unsigned", "--light")
    assert done.returncode == 1
    assert "http_401" in done.stdout
    assert "secret" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["ftp://host/score"], "http:// or https://"),
        ([DEAD, "--header", "no-separator"], "NAME=VALUE"),
        ([DEAD, "--header", "authorization: Bearer s3cret="], "NAME=VALUE"),
        ([DEAD, *2 * ("--header", "authorization: Bearer s3cret=")], "NAME=VALUE"),
        ([DEAD, "--header", "Bearer s3cret=x"], "letters, digits and hyphens"),
        ([DEAD, "--header", "host=x"], "host"),
        ([DEAD, "--header", "x-a=1", "--header", "X-A=2"], "are the same header"),
        ([DEAD, "--header", "x-a=1", "--header", "x-a=2"], "given twice"),
        ([DEAD, "--secret-file", "/nowhere/secret"], "cannot be read"),
        ([DEAD, "--samples", "/nowhere/samples"], "cannot be read"),
        ([DEAD, "--protocol", "smtp"], "protocol"),
        ([DEAD, "--protocol", "plain"], "template"),
        ([DEAD, "--concurrency", "0"], "concurrency"),
        (["rwe_01ARZ3NDEKTSV4RRFFQ69G5FAV", "--reply", "either"], "--reply is for URLs"),
        ([], "Missing argument"),
    ],
)
def test_what_is_typed_wrongly_exits_with_two_and_says_why(
    check: Run, arguments: list[str], word: str
) -> None:
    done = check(*arguments)
    assert done.returncode == 2
    assert word in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert "s3cret" not in done.stderr


def test_a_file_without_usable_samples_is_named(check: Run, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    for text, word in (("{}", "1 samples"), ('{"prompt": "a"}\n{}', "sample 1: completion")):
        samples.write_text(text)
        done = check(DEAD, "--samples", str(samples))
        assert done.returncode == 2
        assert word in " ".join(done.stderr.split())


class Full(io.RawIOBase):
    """An output on a disk that is full."""

    def writable(self) -> bool:
        return True

    def write(self, _: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_every_encoding_carries_the_report(
    service: Service, monkeypatch: pytest.MonkeyPatch, encoding: str, options: tuple[str, ...]
) -> None:
    service.answer = lambda _: (200, '{"r\u00e9sum\u00e9": "\u2192 \U0001f600"}'.encode())
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    monkeypatch.setattr(sys, "argv", ["dar", "reward", "check", service.url, "--light", *options])
    monkeypatch.setenv("DAR_REWARD_SECRET", SECRET)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    shown = written.getvalue().decode(encoding)
    assert not options or not ProbeReport.model_validate_json(shown).ok
    assert options or "Not usable" in shown


@pytest.mark.parametrize(
    "command", [("--version",), ("--help",), ("reward", "check", DEAD, "--unsigned", "--light")]
)
@pytest.mark.parametrize("is_buffered", [True, False])
def test_an_output_that_takes_no_more_ends_a_command_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    is_buffered: bool,
) -> None:
    discarded: list[object] = []
    raw: Any = io.BufferedWriter(Full()) if is_buffered else Full()
    output = io.TextIOWrapper(raw, "utf-8", write_through=not is_buffered)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", ["dar", *command])
    monkeypatch.setattr("dar.output._discard", discarded.append)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said == "dar: the output cannot be written: No space left on device\n"
    assert discarded == [output]
    if isinstance(raw, io.BufferedWriter):
        monkeypatch.setattr(Full, "write", lambda _, data: len(data))
        output.flush()


def test_a_component_of_another_url_is_refused(check: Run, tmp_path: Path) -> None:
    component = tmp_path / "component.json"
    component.write_text('{"columns": ["n"], "url": "http://127.0.0.1:2/other"}')
    done = check(DEAD, "--component", str(component))
    assert done.returncode == 2
    said = "".join(done.stderr.replace("│", " ").split())
    assert "hasanotherurlthantheonethatistobechecked" in said


def test_a_component_that_is_no_json_object_is_named(check: Run, tmp_path: Path) -> None:
    component = tmp_path / "component.json"
    deep = '{"protocol": "plain", "template": ' + "[" * 1000 + "]" * 1000 + "}"
    for text, word in (("{", "is not JSON"), (deep, "is not JSON: recursion"), ("[]", "one JSON")):
        component.write_text(text)
        done = check(DEAD, "--component", str(component))
        assert done.returncode == 2
        assert word in " ".join(done.stderr.replace("│", "").split())

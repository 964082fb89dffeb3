"""Every exception that can leave a trainer has one owner, and a sentence for the job's user."""

import errno
import io
import json
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from torch.distributed import DistBackendError

import dar.errors
from dar.errors import (
    CheckpointError,
    ConfigurationError,
    DARError,
    HubUnreachableError,
    InvalidRequestError,
    RewardBudgetError,
    RewardContractError,
    RewardMisconfiguredError,
    RewardUnavailableError,
    ServiceUnavailableError,
    TrainingError,
)
from dar.protocol.spec import JobSpec
from dar.protocol.worker import Fail, FailureOwner, Release, WorkerFault
from dar.training.data.load_errors import blame
from dar.training.parallel.ranks import ProcessFailedError
from fakes import tiny_models
from fakes.hub import Hub, use_hub
from fakes.scripted_installation import ScriptedInstallation
from worker.attempt.main import StdinControl, attend, train_with_torch
from worker.failures import failure_of, presentable
from worker.folders import AttemptFolder, AttemptRecord, SlotFolder
from worker.launch import ExitCode, Launch, TrainerResult
from worker.models.local import InputFetchError
from worker.supervisor.child_process import TrainerExit
from worker.supervisor.outcome import AttemptEnd, failure, judge, settle

SECRET = "whsec_c2VjcmV0"
ROWS = [{"prompt": "w5", "completions": ["w6", "w7"], "rewards": [1.0, 0.0]}]
REWARDS = {"components": [{"name": "r", "url": "http://127.0.0.1:1/score"}]}


class PanicException(BaseException):
    """What a panic of a library in Rust looks like: it is no `Exception`."""


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Launch]:
    """A launch of a trainer, with its folder."""
    folder = SlotFolder.of(tmp_path, "0").attempt("lease-1")
    folder.create(AttemptRecord(lease_id="lease-1", job_id="ftjob-1", attempt=1))
    training_file = folder.inputs / "training_file"

    def make(
        dar: dict[str, Any] | None = None,
        rows: str = "".join(json.dumps(row) + "\n" for row in ROWS),
        **fields: Any,
    ) -> Launch:
        training_file.write_text(rows)
        usual = {"hyperparameters": {"max_steps": 1, "batch_size": 1, "dar_k": 2}}
        method = {"type": "dar", "dar": usual | (dar or {})}
        model = fields.get("hub_model", "tiny")
        spec = {"model": model, "training_file": "file-1", "method": method}
        values: dict[str, Any] = {
            "folder": folder.path, "job_id": "ftjob-1", "spec": JobSpec.model_validate(spec), "seed": 1, "total_steps": 1,
            "model_folder": tmp_path / "models" / "tiny", "hub_model": None, "adapters": (), "training_file": training_file,
            "resume_from": None, "reward_secret": SECRET, "threads": 1,
        }  # fmt: skip
        return Launch(**values | fields)

    return make


def end_of(launch: Launch, error: BaseException) -> AttemptEnd:
    """What a worker reports after ``error`` left the training."""

    def train(*_: object) -> Any:
        raise error

    return reported(launch, attend(launch, StdinControl(io.BytesIO()), train))


def reported(launch: Launch, code: ExitCode) -> AttemptEnd:
    content = AttemptFolder(launch.folder).result.read_text()
    return judge(1, TrainerExit(code, ""), TrainerResult.model_validate_json(content), None)


def torch_error(cls: type[BaseException], text: str) -> BaseException:
    return cls(text)


OWNERS: list[tuple[BaseException, str]] = [
    (TrainingError("the loss is NaN"), "user"),
    (InvalidRequestError("row 1 has no prompt"), "user"),
    (HubUnreachableError("the hub cannot be reached"), "user"),
    (RewardUnavailableError("connection refused"), "reward"),
    (RewardMisconfiguredError("HTTP 401"), "reward"),
    (RewardContractError("no results"), "reward"),
    (RewardBudgetError("3 of 4 failed"), "reward"),
    (RewardBudgetError("3 of 4 failed", errors={"client_fault": 2, "http_503": 1}), "reward"),
    (RewardBudgetError("3 of 4 failed", errors={"client_fault": 3}), "service"),
    (MemoryError(), "worker"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "worker"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "worker"),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "worker"),
    (RuntimeError("CUDA error: unspecified launch failure"), "worker"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "worker"),
    (DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"), "worker"),
    (OSError(errno.ENOSPC, "No space left on device", "/root/x"), "worker"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "worker"),
    (sqlite3.OperationalError("database or disk is full"), "worker"),
    (PermissionError(errno.EACCES, "Permission denied", "/root/.cache/x"), "worker"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "/usr/lib/x"), "worker"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "worker"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "worker"),
    (TimeoutError(), "worker"),
    (httpx2.ReadTimeout("timed out"), "worker"),
    (ModuleNotFoundError("No module named 'sentencepiece'"), "worker"),
    (CheckpointError("/root/x/step-3: model.safetensors is missing"), "storage"),
    (ServiceUnavailableError("no room", code="storage_full"), "storage"),
    (ServiceUnavailableError("it is away", code="database_unavailable"), "database"),
    (ConfigurationError("a secret starts with whsec_"), "service"),
    (ServiceUnavailableError("storage is away"), "service"),
    (DARError("a fault"), "service"),
    (ProcessFailedError("process 1 of this training run has failed with KeyError: 'x'"), "service"),
    (RuntimeError("a cosmic ray"), "service"),
    (RecursionError("maximum recursion depth exceeded"), "service"),
    (OverflowError("int too large"), "service"),
    (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "service"),
    (AssertionError(), "service"),
    (KeyError("logps"), "service"),
    (ZeroDivisionError("division by zero"), "service"),
    (TypeError("unhashable type: 'list'"), "service"),
    (NotImplementedError(), "service"),
    (SystemExit(3), "service"),
    (KeyboardInterrupt(), "service"),
    (PanicException("called `Option::unwrap()` on a `None` value"), "service"),
]
"""Exceptions of training, and whose fault each is."""


@pytest.mark.parametrize(("error", "owner"), OWNERS, ids=lambda value: repr(value)[:60])
def test_whatever_leaves_training_is_reported_with_its_owner(
    launch: Callable[..., Launch], error: BaseException, owner: str
) -> None:
    end = end_of(launch({"rewards": REWARDS}), error)
    assert failure_of(error).owner == owner
    if isinstance(end, Release):
        assert owner == "reward"
    else:
        assert isinstance(end, Fail)
        assert end.owner == owner
        assert end.kind == ("user" if owner == "user" else "transient")
    assert end.message
    assert "\n" not in end.message
    assert "/root" not in end.message
    assert "Traceback" not in end.message


def test_every_class_of_ours_has_an_owner() -> None:
    """A new class of `dar.errors` is a user's fault only if the same request fails again."""
    classes = [
        cls
        for cls in vars(dar.errors).values()
        if isinstance(cls, type) and issubclass(cls, DARError)
    ]
    told = {type(error) for error, _ in OWNERS}
    for cls in classes:
        owner = failure_of(cls("it failed")).owner
        if cls in told or owner == "reward":
            continue
        assert owner == ("service" if cls.retryable or cls.status >= 500 else "user"), cls


def test_without_pauses_a_reward_service_fails_the_job_as_its_owner(
    launch: Callable[..., Launch],
) -> None:
    failing = launch({"rewards": REWARDS | {"failure": {"on_budget": "fail"}}})
    end = end_of(failing, RewardBudgetError("3 of 4 failed"))
    assert isinstance(end, Fail)
    assert (end.kind, end.owner, end.code) == ("user", "reward", "reward_budget_exhausted")


def test_a_hub_that_was_reached_before_is_tried_again(
    launch: Callable[..., Launch], tmp_path: Path
) -> None:
    resumed = launch(resume_from=tmp_path / "resume")
    end = end_of(resumed, HubUnreachableError("the hub cannot be reached"))
    assert isinstance(end, Fail)
    assert (end.kind, end.owner) == ("transient", "worker")


def test_a_message_holds_no_secret_no_path_and_no_traceback(
    launch: Callable[..., Launch], tmp_path: Path
) -> None:
    begun = launch()
    said = (
        f"no file in directory {begun.model_folder}. See file://{tmp_path}/log, {SECRET} and "
        f"'{tmp_path}/a b', or https://hub.example/x/y\nTraceback (most recent call last):\n  File"
    )
    end = end_of(begun, TrainingError(said))
    assert isinstance(end, Fail)
    assert end.message == (
        "no file in directory tiny. See log, [redacted] and 'a b', or https://hub.example/x/y"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("POST /v1/score/x gave 500", "POST /v1/score/x gave 500"),
        ("http://127.0.0.1:9/usr/lib: refused", "http://127.0.0.1:9/usr/lib: refused"),
        ("3/4 of them and/or none", "3/4 of them and/or none"),
        ("[Errno 2]: '/usr/lib/x.so'", "[Errno 2]: 'x.so'"),
        ("path=/usr/lib/x.so.", "path=x.so."),
        ("a row has \ttabs\nand lines", "a row has tabs and lines"),
    ],
)
def test_only_paths_of_this_machine_are_cut(text: str, shown: str) -> None:
    assert presentable(text) == shown


def test_a_worker_that_cannot_continue_names_the_owner_too(tmp_path: Path) -> None:
    full = failure(2, OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x")))
    assert (full.kind, full.owner, full.code) == ("transient", "worker", "disk_full")
    assert str(tmp_path) not in full.message
    assert (
        failure(2, InputFetchError("the disk has 3 bytes free", code="disk_full")).owner == "worker"
    )
    altered = InputFetchError("training_file arrived altered", code="input_altered")
    assert failure(2, altered).owner == "storage"
    refused = failure(2, InvalidRequestError("no metric 'x'"))
    assert (refused.owner, refused.counts) == ("service", False)


def test_a_trainer_that_cannot_say_why_it_ended_is_the_workers_unless_a_signal_ended_it() -> None:
    """Without any report, not even of an error, the installation may be broken."""
    ends = ((-9, "memory", "user"), (-11, "SIGSEGV", "user"), (1, "exit code 1", "worker"))
    for code, words, owner in ends:
        end = judge(1, TrainerExit(code, "Traceback (most recent call last):\n  x"), None, None)
        assert isinstance(end, Fail)
        assert (end.kind, end.owner) == ("transient", owner)
        assert words in end.message
        assert "Traceback" not in end.message


FULL = WorkerFault(code="disk_full", message="the worker's disk has 3 bytes free")


@pytest.mark.parametrize(
    ("code", "owner", "fault", "expected"),
    [
        ("trainer_crashed", "user", None, ("user", "trainer_crashed")),
        ("trainer_crashed", "worker", None, ("worker", "trainer_crashed")),
        ("trainer_crashed", "user", FULL, ("worker", "disk_full")),
        ("out_of_memory", "worker", None, ("user", "out_of_memory")),
        ("out_of_memory", "worker", FULL, ("worker", "disk_full")),
        ("process_failed", "worker", None, ("user", "process_failed")),
        ("trainer_failed", "service", None, ("service", "trainer_failed")),
        ("trainer_failed", "service", FULL, ("worker", "disk_full")),
        ("device_failed", "worker", None, ("worker", "device_failed")),
        ("disk_full", "worker", None, ("worker", "disk_full")),
        ("input_altered", "storage", FULL, ("storage", "input_altered")),
    ],
)
def test_the_self_check_decides_whether_the_machine_or_the_job_has_failed(
    code: str, owner: FailureOwner, fault: WorkerFault | None, expected: tuple[str, str]
) -> None:
    end = Fail(attempt=1, kind="transient", code=code, message="it ended.", owner=owner)
    settled = settle(end, lambda: fault)
    assert (settled.owner, settled.code) == expected
    assert settled.message.startswith("it ended")
    if settled.code != code:
        assert "3 bytes free" in settled.message
        assert settled.counts is False


def test_one_of_several_processes_that_is_killed_is_named(tmp_path: Path) -> None:
    """The first process cannot go on, and leaves a report before it ends."""
    script = """
        import os, sys, time
        from types import SimpleNamespace
        from pathlib import Path
        from worker.attempt.siblings import Siblings
        from worker.folders import AttemptFolder
        siblings = Siblings.__new__(Siblings)
        siblings._folder = AttemptFolder(Path(sys.argv[1]))
        siblings._folder.log_of(1).write_text("Traceback")
        siblings._end_like(1, 64)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    how = subprocess.run(command, capture_output=True, check=False)
    content = TrainerResult.model_validate_json(AttemptFolder(tmp_path).result.read_text())
    end = judge(1, TrainerExit(how.returncode, ""), content, None)
    assert isinstance(end, Fail)
    assert (end.kind, end.owner, end.code) == ("transient", "worker", "process_failed")
    assert "process 1 of the job ended with exit code 64" in end.message


# --- what the input causes ------------------------------------------------------------------------


def trained(launch: Launch) -> Fail:
    """The report about a real training, which must fail."""
    code = attend(launch, StdinControl(io.BytesIO()), train_with_torch)
    end = reported(launch, code)
    assert isinstance(end, Fail), end
    return end


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model."""
    return tiny_models.save(tiny_models.policy(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model with other values in its config.json, and other files."""

    def make(config: dict[str, Any], files: dict[str, bytes | None]) -> Path:
        folder = tmp_path / "models" / "tiny"
        folder.mkdir(parents=True)
        for path in base.iterdir():
            content = files.get(path.name, path.read_bytes())
            if path.name == "config.json" and config:
                content = json.dumps(json.loads(path.read_text()) | config).encode()
            if content is not None:
                (folder / path.name).write_bytes(content)
        return folder

    return make


BAD_CONFIGS: list[dict[str, Any]] = [
    {"hidden_size": "wide"},
    {"num_attention_heads": 0},
    {"num_hidden_layers": 9},
    {"vocab_size": 9},
    {"model_type": "nope"},
    {"model_type": ["llama"]},
    {"model_type": "bert"},
    {"hidden_act": "nope"},
    {"dtype": "nope"},
    {"rope_scaling": 7},
    {"eos_token_id": "end"},
    {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
]
BAD_FILES: list[tuple[str, bytes | None]] = [
    ("config.json", b"{"),
    ("config.json", b"[1]"),
    ("config.json", b"\xff\xfe"),
    ("generation_config.json", b"[1]"),
    ("model.safetensors", b"short"),
    ("model.safetensors", None),
    ("tokenizer.json", b"{"),
    ("tokenizer.json", b'{"version": "1.0", "model": {"type": "nope"}}'),
    ("tokenizer.json", None),
    ("tokenizer_config.json", b"[]"),
]
ODD_MODELS = [(config, {}) for config in BAD_CONFIGS] + [
    ({}, {name: content}) for name, content in BAD_FILES
]


@pytest.mark.parametrize(("config", "files"), ODD_MODELS, ids=str)
def test_a_model_that_does_not_load_is_the_users_at_the_first_attempt(
    launch: Callable[..., Launch],
    model: Callable[..., Path],
    config: dict[str, Any],
    files: dict[str, bytes | None],
    tmp_path: Path,
) -> None:
    end = trained(launch(model_folder=model(config, files)))
    assert (end.kind, end.owner, end.param) == ("user", "user", "model"), end
    assert "tiny" in end.message
    assert str(tmp_path) not in end.message
    assert "\n" not in end.message


def test_a_hub_model_that_is_not_here_is_said_and_the_hub_is_not_asked(
    launch: Callable[..., Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub({"team/policy": {"config.json": b"{}"}}) as hub:
        use_hub(monkeypatch, hub.endpoint, tmp_path / "hub")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as in a trainer's environment
        end = trained(launch(model_folder=None, hub_model="team/policy"))
        assert hub.requests == []
    assert (end.kind, end.code, end.param) == ("user", "training_failed", "model")
    assert "this process may not call the hub" in end.message


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.example/x"))


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (RepositoryNotFoundError("404", response=answer(404)), "the hub does not have the model"),
        (GatedRepoError("403", response=answer(403)), "only to accounts that its owner"),
        (
            HfHubHTTPError("401", response=answer(401)),
            "refuses the model 'a/b' (HTTP 401); set DAR",
        ),
        (
            HfHubHTTPError("403", response=answer(403)),
            "refuses the model 'a/b' (HTTP 403); set DAR",
        ),
        (HfHubHTTPError("503", response=answer(503)), "the hub cannot be reached"),
        (HfHubHTTPError("429", response=answer(429)), "the hub cannot be reached"),
        (httpx2.ConnectError("no route"), "cannot be reached to load the model 'a/b' (no route)"),
        (ValueError("odd\nreport"), "the model 'a/b' does not load: odd"),
        (KeyError("weight"), "the model 'a/b' does not load: KeyError: 'weight'"),
    ],
    ids=repr,
)
def test_what_the_hub_says_is_told_in_one_sentence(cause: Exception, words: str) -> None:
    wrapped: Exception = cause
    if isinstance(cause, HfHubHTTPError):  # as transformers raises it
        wrapped = OSError("We could not\nload it")
        wrapped.__cause__ = cause
    with pytest.raises(DARError, match=r"\S") as told:
        blame(wrapped, "the model 'a/b'", "the model 'a/b' does not load", param="model", is_offline=False)  # fmt: skip
    assert words in told.value.message
    assert "\n" not in told.value.message


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), MemoryError()],
    ids=repr,
)
def test_a_full_worker_is_not_blamed_on_the_model(error: Exception) -> None:
    wrapped = ValueError("it could not be unpacked")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        with pytest.raises(type(error)) as raised:
            blame(one, "the model 'a/b'", "it does not load", param="model", is_offline=False)
        assert raised.value is error


# --- jobs -----------------------------------------------------------------------------------------


def test_a_hub_model_fails_its_job_at_the_first_attempt(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(exit="hub")
    installation.start_worker()
    job = installation.wait(job_id, "succeeded", "failed")
    assert (job["status"], job["status_detail"], job["attempt"]) == ("failed", "user_error", 1)
    assert job["error"]["code"] == "hub_unreachable"


@pytest.mark.slow  # three attempts, with the pauses between them
def test_a_fault_of_ours_ends_as_poison_without_a_traceback(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(exit="fault")
    installation.start_worker()
    job = installation.wait(job_id, "succeeded", "failed", seconds=60.0)
    assert (job["status"], job["status_detail"], job["attempt"]) == ("failed", "poison", 3)
    message = job["error"]["message"]
    assert "RecursionError: too deep" in message
    assert "The cause lies with the service or its trainer" in message
    said = [message, *installation.messages(job_id)]
    assert not any(word in text for text in said for word in ("Traceback", str(installation.home)))

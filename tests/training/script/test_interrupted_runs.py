"""`dar train` in a folder, or with an output, that does not last."""

import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dar.training.script.main import main
from fakes.training.folder import command

HOLDER = """
import sys
from pathlib import Path
from dar.training.script.run_lock import output_lock
with output_lock(Path("out")):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_at_a_time_writes_into_an_output_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for more in ([], ["--overwrite_output_dir"]):
            assert main(command(*more)) == 64
            said = " ".join(capsys.readouterr().err.split())
            assert f"--output_dir out is used by another run (process {other.pid} on " in said
        other.kill()  # its file stays, without its lock
    assert (folder / "out" / ".dar-train.lock").is_file()
    assert main(command(max_steps=1)) == 0
    assert not (folder / "out" / ".dar-train.lock").exists()
    assert main(command("--resume_from_checkpoint", "latest", max_steps=1)) == 0
    assert main(command(output_dir="new", reward_function="judge:nothing")) == 64
    assert not (folder / "new").exists()


def test_a_terminal_that_closes_stops_a_run_with_a_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert main(command(alpha=0.1, reward_function="judge:hanging_up", max_steps=3)) == 129
        assert "a checkpoint was written" in capsys.readouterr().err
        assert (folder / "out" / "checkpoints" / "step-1" / "MANIFEST.json").is_file()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert main(command(output_dir="on", reward_function="judge:hanging_up")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("place", ["pipe", "terminal", "full disk"])
def test_a_run_goes_on_when_its_output_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "full disk":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, output = os.pipe() if place == "pipe" else os.openpty()
        os.close(reader)
    arguments = command(reward_function="judge:talking", max_steps=1)
    with (
        io.TextIOWrapper(io.FileIO(output, "w"), write_through=True) as broken,
        monkeypatch.context() as patched,
    ):
        patched.setattr(sys, "stdout", broken)
        patched.setattr(sys, "stderr", broken)
        assert main(arguments) == 0
        assert sys.stderr is broken
    assert (folder / "out" / "checkpoints" / "step-1").is_dir()
    assert (folder / "out" / "model.safetensors").is_file()


def test_a_disk_that_takes_no_more_is_a_sentence_with_the_checkpoint_to_continue_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run_on_a_full_disk(*more: str, **options: object) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        try:
            assert main(command(*more, **options)) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        last = capsys.readouterr().err.splitlines()[-1]
        assert "written to out" in last
        assert "File too large (" in last
        assert "raise the limit on the size of a file (ulimit -f), then " in last
        return last

    said = run_on_a_full_disk(max_steps=1)
    assert said.startswith("dar train: the checkpoint of step 1 could not be")
    assert said.endswith("then start again, as there is no checkpoint")
    assert main(command(max_steps=1)) == 0
    said = run_on_a_full_disk("--resume_from_checkpoint", "latest", max_steps=2)
    assert said.startswith("dar train: the checkpoint of step 2 could not be written")
    assert "continue with --resume_from_checkpoint out/checkpoints/step-1, which is" in said
    assert main(command("--resume_from_checkpoint", "latest", max_steps=2)) == 0
    capsys.readouterr()
    said = run_on_a_full_disk(output_dir="out2", save_strategy="no", max_steps=1)
    assert said.startswith("dar train: the model could not be written to out2: ")

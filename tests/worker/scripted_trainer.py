"""A trainer that speaks the whole protocol of `worker.attempt` and computes nothing: its steps take
a moment each.

Each step makes the next state out of the one before (`fakes.scripted_states`), and checkpoints hold
it: a step that is left out, repeated or resumed from another job shows in the weights. What else it
does stands in the job's metadata: ``crash_at`` (a step; only in the first attempt), ``hang_at``
(the same), ``exit`` (an error), ``seconds`` (per step), ``deaf`` (no order is heeded), ``metric``
(one more, by that name), ``nul`` (whatever it says holds one). With ``die`` it kills itself at
``crash_at``.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dar.errors import (
    HubUnreachableError,
    RewardMisconfiguredError,
    RewardUnavailableError,
    TrainingError,
)
from dar.protocol.checkpoints import MANIFEST_NAME, Manifest, ManifestFile
from dar.protocol.samples import ReportedSample
from fakes.scripted_states import next_state, state_after, weights
from worker.attempt.main import How, SpoolSink, StdinControl, leave, main
from worker.launch import Launch


def publish(launch: Launch, sink: SpoolSink, step: int, state: bytes) -> None:
    folder = launch.folder / "work" / "checkpoints" / f"step-{step}"
    fresh = folder.with_name(f".tmp-{folder.name}")
    (fresh / "resume").mkdir(parents=True, exist_ok=True)
    contents = {
        "config.json": b"{}",
        "empty.txt": b"",
        "model.safetensors": weights(state),
        "resume/state.json": json.dumps({"step": step, "state": state.hex()}).encode(),
    }
    for name, content in contents.items():
        (fresh / name).write_bytes(content)
    manifest = Manifest(
        step=step,
        kind="full",
        last_seq=sink.flush(),
        config_sha256="0" * 64,
        files=[
            ManifestFile(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in contents.items()
        ],
    )
    text = manifest.model_dump_json(indent=1).encode()
    (fresh / MANIFEST_NAME).write_bytes(text)
    fresh.rename(folder)
    sink.checkpoint(step, folder, manifest, hashlib.sha256(text).hexdigest())


def say_nul(sink: SpoolSink) -> None:
    sample = ReportedSample(
        group=0,
        index=0,
        prompt="a\0b",
        completion="c\0d",
        finish_reason="stop",
        completion_tokens=1,
        reward=1.0,
        reward_status="reward",
        feedback={"r": "e\0f"},
        advantage=None,
        weight=None,
        logp_policy=None,
        logp_ref=None,
        logp_behavior=0.0,
    )
    sink.samples(1, [sample])
    sink.event("info", "an odd\0event", {"k\0": ["v\0"]})
    raise TrainingError("an odd\0prompt")


def say_files(launch: Launch, sink: SpoolSink) -> None:
    """Which data there are; a data set of a hub is named in the spec alone."""
    if launch.training_file is None:
        sink.event("info", f"no training file: {launch.spec.training_file}")
    else:
        assert launch.training_file.read_bytes().startswith(b"{")
    if launch.validation_file is not None:
        sink.event("info", f"validation file: {launch.validation_file.read_text()}")


def say_refused(launch: Launch, sink: SpoolSink) -> None:
    """Two steps are done when the reward service refuses; it echoes the secret."""
    for step in (1, 2):
        sink.metrics(step, {"dar/loss": 1 / step})
    publish(launch, sink, 2, state_after(launch.seed, 2))
    (access,) = launch.reward_access.values()
    raise RewardMisconfiguredError(
        f"reward service http://127.0.0.1:1 : HTTP 401: not {access.secrets[0]}", code="http_401"
    )


def begin(launch: Launch, script: dict[str, str], sink: SpoolSink) -> tuple[int, bytes]:
    """The step that was done last, and the state after it."""
    assert launch.model_folder is not None
    assert (launch.model_folder / "config.json").is_file()
    if script.get("exit") == "user":
        raise TrainingError("the data cannot work", param="training_file")
    if script.get("exit") == "refused" and launch.resume_from is None:
        say_refused(launch, sink)
    if script.get("exit") == "reward":
        raise RewardUnavailableError("reward service http://127.0.0.1:1 : connection refused")
    if script.get("exit") == "hub":
        raise HubUnreachableError("the hub cannot be reached to load the model 'a/b'")
    if script.get("exit") == "fault":
        raise RecursionError(f"too deep\nin {launch.folder}")
    if launch.resume_from is None:
        return 0, state_after(launch.seed, 0)
    kept = json.loads((launch.resume_from / "resume" / "state.json").read_text())
    return int(kept["step"]), bytes.fromhex(kept["state"])


def crash(launch: Launch, script: dict[str, str], step: int) -> None:
    if step != int(script.get("crash_at", -1)) or launch.resume_from is not None:
        return
    if "die" in script:
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("a cosmic ray")


def hang(launch: Launch, script: dict[str, str], step: int) -> None:
    if step == int(script.get("hang_at", -1)) and launch.resume_from is None:
        time.sleep(3600)


def train(launch: Launch, sink: SpoolSink, control: StdinControl) -> How:
    control.begin()
    script = launch.spec.metadata or {}
    every = launch.spec.dar.checkpointing.every_steps or launch.total_steps
    odd = {script["metric"]: 1.0} if "metric" in script else {}
    if "nul" in script:
        say_nul(sink)
    say_files(launch, sink)
    first, state = begin(launch, script, sink)
    for step in range(first + 1, launch.total_steps + 1):
        sink.phase("training", step - 1)
        hang(launch, script, step)
        time.sleep(float(script.get("seconds", "0.02")))
        request = None if "deaf" in script else control.requested()
        if request == "cancel":
            return "cancelled"
        state = next_state(state)
        sink.metrics(step, {"dar/loss": 1 / step, "dar/rewards_mean": float("nan")} | odd)
        if step % every == 0 or step == launch.total_steps or request is not None:
            publish(launch, sink, step, state)
        if request is not None:
            return "drained"
        crash(launch, script, step)
    return "finished"


if __name__ == "__main__":
    leave(main(train))

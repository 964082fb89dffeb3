"""What the parts of one service process share."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from dar.rewards.probe.callbacks import ProbeInbox
from dar.settings import Settings
from service.artifacts import Artifacts
from service.background.notifier import Notifier
from service.background.waker import Waker
from service.callbacks import Callbacks
from service.http.rate_limits import Throttle
from service.rewards.probing import Remembered
from service.secret_box import SecretBox
from service.store.database import Database
from service.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Runtime:
    """Settings, database, files and background threads of a process."""

    settings: Settings
    database: Database
    artifacts: Artifacts
    waker: Waker
    notifier: Notifier
    telemetry: Telemetry
    reward_secret: str = field(repr=False)
    secrets: SecretBox
    """Opens the secrets of reward endpoints."""
    probe_inbox: ProbeInbox
    """Takes the callbacks of this process's own probes."""
    probes: Throttle = field(default_factory=lambda: Throttle(6, 60.0, "probes"))
    gradings: Throttle = field(default_factory=lambda: Throttle(60, 60.0, "runs of a grader"))
    tries: Throttle = field(default_factory=lambda: Throttle(120, 60.0, "tries at submission"))
    remembered: Remembered = field(default_factory=Remembered)
    """Reward services that a submission need not try again yet."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    """Counts what reward services post."""


async def current(request: Request) -> Runtime:
    """The runtime of the application that serves the request."""
    runtime: Runtime = request.app.state.runtime
    return runtime


CurrentRuntime = Annotated[Runtime, Depends(current)]

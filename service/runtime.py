"""What the routes and background threads of one service process share."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from dar.rewards.probe.callbacks import ProbeInbox
from service.artifacts import Artifacts
from service.background.bounded_checks import BoundedChecks
from service.background.feeds import JobFeeds
from service.background.notifier import Notifier
from service.background.waker import Waker
from service.http.rate_limits import FailureThrottle, PassedProbes, Throttle
from service.installation import Installation
from service.storage.storage import DirectTransfers
from service.telemetry import Telemetry

UPLOAD_CHECKS = 2
"""Uploaded files that are checked at once. A check takes a processor, and memory for a row."""


@dataclass(frozen=True, slots=True)
class Runtime(Installation):
    """An installation with the files, threads and counters of this process."""

    artifacts: Artifacts
    waker: Waker
    notifier: Notifier
    feeds: JobFeeds
    telemetry: Telemetry
    probe_inbox: ProbeInbox
    """Receives the callbacks of this process's own probes."""
    probes: Throttle = field(default_factory=lambda: Throttle(6, 60.0, "probes"))
    gradings: Throttle = field(default_factory=lambda: Throttle(60, 60.0, "runs of a grader"))
    submission_probes: Throttle = field(
        default_factory=lambda: Throttle(120, 60.0, "probes at submission")
    )
    upload_checks: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(UPLOAD_CHECKS)
    )
    passed_probes: PassedProbes = field(default_factory=PassedProbes)
    callback_failures: FailureThrottle = field(default_factory=FailureThrottle)
    """Callbacks with wrong credentials, by address."""
    readiness: BoundedChecks = field(default_factory=BoundedChecks)

    @property
    def user_transfers(self) -> DirectTransfers | None:
        """Signs the URLs that users' downloads are redirected to; None: bytes pass through here."""
        is_redirecting = self.settings.downloads == "redirect"
        return self.artifacts.storage.signed_downloads if is_redirecting else None


async def current(request: Request) -> Runtime:
    """The runtime of the application that serves the request."""
    runtime: Runtime = request.app.state.runtime
    return runtime


CurrentRuntime = Annotated[Runtime, Depends(current)]

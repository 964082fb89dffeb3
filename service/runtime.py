"""What the parts of one service process share."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from dar.settings import Settings
from service.artifacts import Artifacts
from service.callbacks import Callbacks
from service.notifier import Notifier
from service.store.database import Database
from service.waker import Waker


@dataclass(frozen=True, slots=True)
class Runtime:
    """Settings, database, files and background threads of a process."""

    settings: Settings
    database: Database
    artifacts: Artifacts
    waker: Waker
    notifier: Notifier
    reward_secret: str
    callbacks: Callbacks = field(default_factory=Callbacks)


async def current(request: Request) -> Runtime:
    """The runtime of the application that serves the request."""
    runtime: Runtime = request.app.state.runtime
    return runtime


CurrentRuntime = Annotated[Runtime, Depends(current)]

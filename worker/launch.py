"""The messages between a supervisor and its trainer.

The supervisor writes to the trainer's stdin: one line with the `Launch`, then one line per `Order`
or `RewardNews`. The end of that stream means that the supervisor is dead. The trainer reports
through its folder (`worker.folders`), through a pipe with a line per `RewardNote`, and through its
`ExitCode`. Secrets are only in the launch line, never in arguments, environment or files.
"""

import signal
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from dar.protocol.spec import JobSpec
from dar.protocol.worker import (
    ComponentAccess,
    FailureOwner,
    RewardAnnouncement,
    RewardRequestState,
)
from dar.rewards.cache.cache import CachePlace
from dar.rewards.http.egress import EgressPolicy
from dar.rewards.http.redaction import Redactor

SPOOL_BYTES = 2 * 1024**3
"""Default of `Launch.spool_bytes`."""
LOG_BYTES = 16 * 1024**2
"""Default of `Launch.log_bytes`."""


class ExitCode(IntEnum):
    """Exit codes of a trainer; the numbers are those of ``sysexits.h`` where one fits."""

    FINISHED = 0
    CRASHED = 1
    USER_ERROR = 64
    REWARD_UNAVAILABLE = 69
    DRAINED = 75
    CANCELLED = 76
    REWARD_PAUSED = 77


STACKS_SIGNAL = signal.SIGUSR1
"""Makes a trainer write the stacks of all its threads into its log."""


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


class Launch(BaseModel):
    """Everything that a trainer needs to start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    """The attempt's folder."""
    job_id: str
    request_id: str | None = None
    """Of the request that submitted the job, for the log."""
    spec: JobSpec
    seed: int
    total_steps: int
    model_folder: Path | None
    """Folder of the model; None: it is the hub model ``hub_model``, in the cache of the hub's
    library."""
    hub_model: str | None
    adapters: tuple[Path, ...]
    """Adapters to merge into the model, in this order."""
    training_file: Path | None
    """JSON Lines, or a folder with the rows of a hub's data set; None: only the cache of the hub's
    library may have these."""
    validation_file: Path | None = None
    reward_models: dict[str, Path] = Field(default_factory=dict)
    """Folders of reward models by component name; the others come from the hub."""
    resume_from: Path | None
    """Checkpoint from which training continues."""
    reward_secret: str | None = Field(repr=False)
    reward_access: dict[str, ComponentAccess] = Field(default_factory=dict, repr=False)
    """URL and secrets of each component's reward service."""
    reward_guard: EgressPolicy = EgressPolicy()
    """Which addresses reward requests may reach; default: public ones over HTTPS."""
    reward_cache: CachePlace | None = None
    """Where rewards are cached; None: in the attempt's own folder."""
    threads: int
    """CPU threads of this process."""
    spool_bytes: int = SPOOL_BYTES
    """Largest size of the spool."""
    log_bytes: int = LOG_BYTES
    """Size at which a log is begun anew; the part before is kept."""
    process: int = 0
    """Number of this process among those that train together; process 0 starts the others."""
    port: int = 0
    """Port of the loopback address on which process 0 waits for the others; 0: there are none."""
    listener: int | None = None
    """File descriptor of the socket that listens on ``port``."""
    outbox: int | None = None
    """File descriptor of a pipe to the supervisor, for lines with a `RewardNote`."""

    def redactor(self) -> Redactor:
        """A filter that removes every secret of this launch from text, such as a trainer's log."""
        secrets = [] if self.reward_secret is None else [self.reward_secret]
        headers: list[str] = []
        rewards = self.spec.dar.rewards
        urls = [one.url for one in ([] if rewards is None else rewards.components) if one.url]
        for access in self.reward_access.values():
            secrets += access.secrets
            headers += access.headers.values()
            urls.append(access.url)
        return Redactor(secrets, headers, *urls)

    def names(self) -> dict[str, str]:
        """What the user calls the files of this launch, by their path."""
        names = {str(self.folder): "the attempt's folder"}
        named = [
            (self.model_folder, self.spec.model),
            (self.training_file, "training_file"),
            (self.validation_file, "validation_file"),
            (self.resume_from, "the newest checkpoint"),
            *((path, f"adapter {number + 1}") for number, path in enumerate(self.adapters)),
        ]
        names |= {str(path): name for path, name in named if path is not None}
        for component in self.spec.dar.rewards.components if self.spec.dar.rewards else ():
            path = self.reward_models.get(component.name)
            if path is not None and component.model is not None:
                names[str(path)] = component.model
        return names

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.spec.dar.resources.processes


class Order(BaseModel):
    """A request of the supervisor to a running trainer."""

    model_config = ConfigDict(frozen=True)

    type: Literal["cancel", "drain", "stop", "park", "unpark"]
    """``drain``: end with a checkpoint of the last finished step. ``stop``: of the present one.
    ``park``: rest after the present step, until ``unpark`` or a more urgent order."""


class RewardNote(BaseModel):
    """A trainer's note about a reward request, one line on its outbox."""

    model_config = ConfigDict(frozen=True)

    request_id: str
    announcement: RewardAnnouncement | None = None
    """The trainer is about to send the request; the reply is a `RewardNews` with its state."""
    said_at: datetime | None = None
    """When the trainer announced it. The time until the service stores it does not count against
    the deadline."""
    state: Literal["accepted", "closed"] | None = None
    """The state of an announced request."""
    poll_url: str | None = None


class RewardNews(BaseModel):
    """The service's state of a reward request, for a running trainer."""

    model_config = ConfigDict(frozen=True)

    type: Literal["reward"] = "reward"
    request_id: str
    state: RewardRequestState | None = None
    """Reply to an announcement: the request is stored."""
    result: str | None = None
    """The body of a callback."""


Line: TypeAdapter[Order | RewardNews] = TypeAdapter(
    Annotated[Order | RewardNews, Field(discriminator="type")]
)
"""One line from the supervisor to a running trainer."""


class RowsRequest(BaseModel):
    """What a process loads that fetches the rows of a hub's data set; one line on its stdin."""

    model_config = ConfigDict(frozen=True)

    address: str
    """``hf://…``"""
    token: str | None = Field(repr=False)
    """Token of the hub; None: what everybody may read."""
    folder: Path
    """Where the rows are written."""
    result: Path
    """File for the `RowsResult`."""
    has_begun: bool
    """Whether the job has a checkpoint."""


class RowsFailure(BaseModel):
    """Why rows could not be loaded."""

    model_config = ConfigDict(frozen=True)

    owner: FailureOwner
    code: str
    message: str
    param: str | None = None


class RowsResult(BaseModel):
    """How the loading of rows ended."""

    model_config = ConfigDict(frozen=True)

    failure: RowsFailure | None = None


class TrainerResult(BaseModel):
    """How a trainer ended, as it reports itself."""

    model_config = ConfigDict(frozen=True)

    last_seq: int
    """Number of rows in its spool."""
    code: str | None = None
    """Code of the error that ended it."""
    message: str | None = None
    param: str | None = None
    owner: FailureOwner | None = None
    """Whose fault the error is; None where there is none."""
    is_outage: bool = False
    """Whether it ended because of missing rewards, and the cause may pass by itself."""

"""What a supervisor and its trainer say to each other.

The supervisor writes to the trainer's stdin: one line with the `Launch`, then one line per `Order` or
`RewardNews`. The end of that stream
means that the supervisor is dead. The trainer answers through its folder (`worker.folders`), a pipe for what it says about reward
requests, and its `ExitCode`. Secrets
travel in the launch line alone: never in arguments, environment or files.
"""

from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from dar.protocol.spec import JobSpec
from dar.protocol.worker import ComponentAccess, RewardAnnouncement, RewardRequestState
from dar.rewards.cache.cache import CachePlace
from dar.rewards.http.egress import EgressPolicy
from dar.rewards.http.redaction import Redactor


class ExitCode(IntEnum):
    """How a trainer ends; the numbers are those of ``sysexits.h`` where one fits."""

    FINISHED = 0
    CRASHED = 1
    USER_ERROR = 64
    REWARD_UNAVAILABLE = 69
    DRAINED = 75
    CANCELLED = 76
    REWARD_PAUSED = 77


class Launch(BaseModel):
    """All that a trainer needs to start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    """The attempt's folder."""
    job_id: str
    spec: JobSpec
    seed: int
    total_steps: int
    model_folder: Path | None
    """Folder of the model; None: ``hub_model`` names it."""
    hub_model: str | None
    adapters: tuple[Path, ...]
    """Adapters that are merged into the model, in this order."""
    training_file: Path | None
    """None: the spec names a data set of the hub."""
    validation_file: Path | None = None
    reward_models: dict[str, Path] = Field(default_factory=dict)
    """Folders of reward models by component name; those that are not here come from the hub."""
    resume_from: Path | None
    """Checkpoint that training goes on from."""
    reward_secret: str | None = Field(repr=False)
    reward_access: dict[str, ComponentAccess] = Field(default_factory=dict, repr=False)
    """URL and secrets of registered reward endpoints, by component."""
    reward_guard: EgressPolicy = EgressPolicy()
    """Which addresses reward requests may reach; default: public ones over HTTPS."""
    reward_cache: CachePlace | None = None
    """Where rewards are remembered; None: in the attempt's own folder."""
    threads: int
    """CPU threads of this process."""
    is_offline: bool
    process: int = 0
    """Number of this process among those that train together; 0 has started the others."""
    port: int = 0
    """Where on the loopback address process 0 waits for the others; 0: there are none."""
    listener: int | None = None
    """File descriptor of its socket there."""
    outbox: int | None = None
    """File descriptor of a pipe to the supervisor, for lines with a `RewardNote`."""

    def redactor(self) -> Redactor:
        """Removes every secret among it from what is shown: a program may well print what it was sent."""
        secrets = [] if self.reward_secret is None else [self.reward_secret]
        headers: list[str] = []
        for access in self.reward_access.values():
            secrets += access.secrets
            headers += access.headers.values()
        return Redactor(secrets, headers)

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.spec.dar.resources.processes


class Order(BaseModel):
    """What the supervisor wants of a running trainer."""

    model_config = ConfigDict(frozen=True)

    type: Literal["cancel", "drain"]


class RewardNote(BaseModel):
    """What a trainer says about a reward request, as one line on its outbox."""

    model_config = ConfigDict(frozen=True)

    request_id: str
    announcement: RewardAnnouncement | None = None
    """The request is about to be sent; the answer is a `RewardNews` with its state."""
    said_at: datetime | None = None
    """When an announcement was made: how long it waits on its way is not taken off the request's time."""
    state: Literal["accepted", "closed"] | None = None
    """What became of it since."""
    poll_url: str | None = None


class RewardNews(BaseModel):
    """What the service has about a reward request, for a running trainer."""

    model_config = ConfigDict(frozen=True)

    type: Literal["reward"] = "reward"
    request_id: str
    state: RewardRequestState | None = None
    """It is stored; answers an announcement."""
    result: str | None = None
    """The body of a callback."""


Line: TypeAdapter[Order | RewardNews] = TypeAdapter(
    Annotated[Order | RewardNews, Field(discriminator="type")]
)
"""What the supervisor writes to a running trainer."""


class TrainerResult(BaseModel):
    """How a trainer ended, in its own words."""

    model_config = ConfigDict(frozen=True)

    last_seq: int
    """Rows in its spool."""
    code: str | None = None
    """Code of the error that ended it."""
    message: str | None = None
    param: str | None = None
    is_outage: bool = False
    """Whether it ended for want of rewards that may simply come back."""

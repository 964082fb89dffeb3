"""Workers as the service shows them, and an operator's orders to them."""

from typing import Annotated, Literal

from pydantic import Field

from dar.protocol.base import Input, Output, UnixSeconds
from dar.protocol.worker import Name

WorkerState = Literal["idle", "busy", "draining", "drained", "failing", "banned", "gone"]
WORKER_STATES: tuple[WorkerState, ...] = (
    "idle", "busy", "draining", "drained", "failing", "banned", "gone",
)  # fmt: skip


class Worker(Output):
    """A worker: one slot of one node."""

    object: Literal["worker"]
    node: str
    slot: str
    version: str | None
    """Null: a version that reports nothing about itself; then so are the next four fields."""
    devices: list[str] | None
    """Its GPUs; an empty list: it uses the CPU."""
    disk_free: int | None
    """Bytes free in the file system of its folder."""
    disk_total: int | None
    memory_free: int | None
    """Bytes of memory that are free."""
    models: list[str] | None
    """Models that it need not download: folders of its own, and what its cache has, which it shares
    with the other slots of its host. Null: a version that does not report them."""
    model_cache_bytes: int | None
    """Size of the models in its cache."""
    model_cache_limit: int | None
    """Largest size of its cache."""
    state: WorkerState
    """``failing``: it gets no job, because of a fault of its own. ``gone``: it has stopped, or
    sends nothing any more."""
    reason: str | None
    """Why it gets no job."""
    job: str | None
    """Id of the job that it runs; null for a job of another project too."""
    faults: int
    """Attempts in a row that failed by its own fault."""
    retry_at: UnixSeconds | None
    """When it gets a job again after such faults."""
    started_at: UnixSeconds
    seen_at: UnixSeconds
    """Its last claim or heartbeat."""


class WorkerOrder(Input):
    """An order to one worker, or to all workers of a node."""

    node: Name
    slot: Name | None = None
    """Null: all slots of the node."""
    reason: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """Shown in the list of workers."""

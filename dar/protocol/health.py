"""Health of the service."""

from typing import Literal

from dar.protocol.base import Output


class Health(Output):
    """Response of ``/healthz``: the process runs."""

    status: Literal["ok"]
    version: str


class Ready(Output):
    """Response of ``/readyz``: 200 when requests can be served, 503 when not."""

    status: Literal["ok", "degraded", "unavailable"]
    checks: dict[str, str]
    """``database``, ``migrations``, ``storage``, ``broker`` and ``workers``: ``ok``, ``off`` or the
    problem.

    ``storage_room`` begins with ``ok`` or ``full`` and says how many bytes are free.
    """

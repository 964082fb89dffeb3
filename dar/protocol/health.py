"""Whether the service works."""

from typing import Literal

from dar.protocol.base import Output


class Health(Output):
    """Answer of ``/healthz``: the process runs."""

    status: Literal["ok"]
    version: str


class Ready(Output):
    """Answer of ``/readyz``: 200 when requests can be served, 503 when not."""

    status: Literal["ok", "degraded", "unavailable"]
    checks: dict[str, str]
    """Each of ``database``, ``migrations``, ``storage``, ``broker``: ``ok``, ``off`` or what is wrong."""

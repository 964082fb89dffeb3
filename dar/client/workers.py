"""Workers of the installation."""

from dar.client.paging import Listing
from dar.client.transport import Transport
from dar.protocol.base import Page
from dar.protocol.workers import Worker

PATH = "/workers"


class Workers:
    """Workers, and orders to them: ``client.workers``. Orders need a key of scope ``admin``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Listing[Worker]:
        """All workers, by node and slot.

        sick = [worker for worker in client.workers.list() if worker.state == "failing"]
        """
        return Listing(self._transport, PATH, Page[Worker], {})

    def drain(
        self, node: str, slot: str | None = None, *, reason: str | None = None
    ) -> Page[Worker]:
        """Let workers write a checkpoint, give their jobs back and claim no more, until `admit`.

        Args:
            node: The node.
            slot: One slot of it; None: all.
            reason: Shown in the list.

        Raises:
            NotFoundError: There is no such worker.
        """
        return self._order("drain", node, slot, reason)

    def ban(self, node: str, slot: str | None = None, *, reason: str | None = None) -> Page[Worker]:
        """Take jobs from workers at once, and give them no more, until `admit`.

        Args:
            node: The node.
            slot: One slot of it; None: all.
            reason: Shown in the list, and in the events of the jobs.

        Raises:
            NotFoundError: There is no such worker.
        """
        return self._order("ban", node, slot, reason)

    def admit(self, node: str, slot: str | None = None) -> Page[Worker]:
        """End a drain or a ban, and the wait after faults.

        Args:
            node: The node.
            slot: One slot of it; None: all.

        Raises:
            NotFoundError: There is no such worker.
        """
        return self._order("admit", node, slot, None)

    def _order(self, verb: str, node: str, slot: str | None, reason: str | None) -> Page[Worker]:
        given = {"node": node, "slot": slot, "reason": reason}
        body = {name: value for name, value in given.items() if value is not None}
        return self._transport.post(f"{PATH}/{verb}", Page[Worker], body=body)

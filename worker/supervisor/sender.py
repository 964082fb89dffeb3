"""Sends an attempt's spool to the service, in order, for as long as it takes."""

import threading
from collections.abc import Callable

import orjson

from dar.errors import ConflictError
from dar.protocol.worker import NewCheckpointRow
from worker.api import WorkerClient
from worker.folders import AttemptRecord
from worker.spool import SpooledRow, SpoolReader

TakeCheckpoint = Callable[[NewCheckpointRow], None]


def send_batch(
    reader: SpoolReader, client: WorkerClient, record: AttemptRecord
) -> list[SpooledRow]:
    """Send the next rows and forget those that the service committed.

    Returns:
        The rows that were sent; none when the service has all.

    Raises:
        ConflictError: The service lacks rows that were sent before, or has others under their numbers.
        SpoolDamagedError: The spool cannot be read.
        DARError: The service cannot be reached or refuses.
    """
    rows = reader.read()
    if rows:
        ack = client.batch(record.lease_id, record.attempt, (row.payload for row in rows))
        if ack.acked_seq < rows[0].seq:
            raise ConflictError(
                f"the service acknowledges row {ack.acked_seq} of {record.job_id}, but was sent {rows[0].seq}"
            )
        reader.ack(ack.acked_seq)
    return rows


class SpoolSender:
    """Sends the spool of a running attempt; `run` is the body of its thread.

    Args:
        take_checkpoint: Called for each published checkpoint once everything said before it is committed.
        pause_seconds: How long rows may wait for more.
    """

    def __init__(
        self,
        reader: SpoolReader,
        client: WorkerClient,
        record: AttemptRecord,
        take_checkpoint: TakeCheckpoint,
        pause_seconds: float,
    ) -> None:
        self._reader = reader
        self._client = client
        self._record = record
        self._take_checkpoint = take_checkpoint
        self._pause_seconds = pause_seconds
        self._ended = threading.Event()

    def finish(self) -> None:
        """The trainer has ended: `run` returns when everything is sent."""
        self._ended.set()

    def run(self) -> None:
        """Send until everything is sent."""
        while True:
            is_last = self._ended.is_set()  # asked before looking, so that no row slips in between
            rows = self._client.persist(
                lambda: send_batch(self._reader, self._client, self._record), "batch"
            )
            for row in rows:
                if row.type == "checkpoint" and row.seq <= self._reader.acked:
                    self._take_checkpoint(NewCheckpointRow(**orjson.loads(row.payload)))
            if not rows:
                if is_last:
                    return
                self._ended.wait(self._pause_seconds)

"""Sends an attempt's spool to the service, in order, through outages."""

import threading
from collections.abc import Callable

import orjson

from dar.errors import ConflictError, FencedError
from dar.fault_points import fault_point
from dar.protocol.worker import NewCheckpointRow
from worker.api import WorkerClient
from worker.folders import AttemptRecord
from worker.spool import SpooledRow, SpoolReader

TakeCheckpoint = Callable[[NewCheckpointRow], None]


def send_batch(
    reader: SpoolReader, client: WorkerClient, record: AttemptRecord, *, is_running: bool = False
) -> list[SpooledRow]:
    """Send the next rows and acknowledge those that the service committed.

    Args:
        reader: The spool.
        client: With the attempt's token or the worker's key.
        record: The attempt.
        is_running: Whether its trainer runs, so that it must hold the job.

    Returns:
        The rows that were sent; empty when the service has all.

    Raises:
        FencedError: The attempt runs and has lost its job; these rows were stored.
        ConflictError: The service lacks rows that were sent before, or has others under their
            numbers.
        SpoolDamagedError: The spool cannot be read.
        DARError: The service cannot be reached or rejects the rows.
    """
    rows = reader.read()
    if rows:
        payloads = (row.payload for row in rows)
        ack = client.batch(record.lease_id, record.attempt, payloads, record.job_id)
        if ack.acked_seq < rows[0].seq:
            raise ConflictError(
                f"the service acknowledges row {ack.acked_seq} of {record.job_id}, "
                f"but was sent {rows[0].seq}"
            )
        fault_point("worker.sent")
        reader.ack(ack.acked_seq)
        if ack.is_fenced and is_running:
            raise FencedError(
                f"attempt {record.attempt} no longer holds job {record.job_id}; stop the trainer"
            )
    return rows


class SpoolSender:
    """Sends the spool of a running attempt; `run` is the body of its thread.

    Args:
        take_checkpoint: Called for each published checkpoint once all rows before it are committed.
        pause_seconds: How long rows may wait for more rows.
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
        """Make `run` return when everything is sent, because the trainer has ended."""
        self._ended.set()

    def run(self) -> None:
        while True:
            is_last = self._ended.is_set()  # read before the rows, so that no row is missed
            rows = self._client.until_answered(
                lambda: send_batch(self._reader, self._client, self._record, is_running=True),
                "batch",
            )
            for row in rows:
                if row.type == "checkpoint" and row.seq <= self._reader.acked:
                    self._take_checkpoint(NewCheckpointRow(**orjson.loads(row.payload)))
            if not rows:
                if is_last:
                    return
                self._ended.wait(self._pause_seconds)

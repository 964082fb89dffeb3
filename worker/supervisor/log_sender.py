"""Sends the end of the trainer's log to the service, while it runs and when it has ended."""

import threading
from collections.abc import Callable

import structlog

from dar.errors import DARError
from dar.protocol.worker import MOST_LOG_CHARACTERS, TrainerLog
from worker.api import WorkerClient
from worker.folders import AttemptFolder, AttemptRecord, earlier_part

log = structlog.get_logger(__name__)

PAUSE_SECONDS = 10.0


class LogSender:
    """Sends the end of a log whenever it has grown; `run` is the body of its thread.

    The log is a help and no result: what cannot be sent is not tried again, and fails nothing.

    Args:
        folder: Files of the attempt.
        client: With the attempt's token.
        record: The attempt.
        redact: Removes secrets.
    """

    def __init__(
        self,
        folder: AttemptFolder,
        client: WorkerClient,
        record: AttemptRecord,
        redact: Callable[[str], str],
    ) -> None:
        self._folder = folder
        self._client = client
        self._record = record
        self._redact = redact
        self._sent_bytes = 0
        self._ended = threading.Event()

    def finish(self) -> None:
        """Make `run` send the end of the log and return, because the trainer has ended."""
        self._ended.set()

    def run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(PAUSE_SECONDS)
            try:
                self._send()
            except (DARError, OSError) as error:
                log.warning("the trainer's log was not sent", error=str(error))

    def _send(self) -> None:
        content, size = read_end(self._folder, MOST_LOG_CHARACTERS)
        if size == self._sent_bytes:
            return
        # An escape for each byte that is no text, or each secret, may make the text longer.
        text = self._redact(content.decode(errors="replace"))[-MOST_LOG_CHARACTERS:]
        made = TrainerLog(attempt=self._record.attempt, text=text, bytes=size)
        self._client.put_log(self._record.lease_id, made)
        self._sent_bytes = size


def read_end(folder: AttemptFolder, most_bytes: int) -> tuple[bytes, int]:
    """The last bytes of a trainer's log over both its parts, from a line on, and its size."""
    content, size = b"", 0
    for path in (folder.log, earlier_part(folder.log)):
        try:
            with path.open("rb") as file:
                length = file.seek(0, 2)
                size += length
                missing = most_bytes - len(content)
                file.seek(max(0, length - missing))
                content = file.read(missing) + content
        except FileNotFoundError:
            continue
    if len(content) < size:
        content = content[content.find(b"\n") + 1 :]
    return content, size

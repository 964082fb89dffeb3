"""Loads the rows of a hub's data set for an attempt: ``python -m worker.attempt.hub_rows``.

A process of its own, so that the trainer needs neither the hub nor its token. It reads a
`RowsRequest` from stdin, writes the rows into a folder of the attempt, and then a `RowsResult`.
"""

import logging
import sys

from dar.disk import write_atomically
from dar.processes import die_with_parent
from dar.protocol.hub_data import HubData
from dar.rewards.http.redaction import RedactingFormatter, Redactor
from worker.failures import failure_of
from worker.launch import RowsFailure, RowsRequest, RowsResult

log = logging.getLogger(__name__)


def load(asked: RowsRequest) -> None:
    """Load the rows and write them.

    Raises:
        DARError: The hub does not have them, refuses them or does not answer.
    """
    from dar.training.data.hub import load_hub_rows, save_rows  # noqa: PLC0415 - takes seconds

    rows = load_hub_rows(HubData.parse(asked.address), token=asked.token)
    save_rows(rows, asked.folder)


def main() -> None:
    """Run the process. How it ended is in the result, which is missing if it was killed."""
    die_with_parent()
    asked = RowsRequest.model_validate_json(sys.stdin.buffer.readline())
    redact = Redactor(() if asked.token is None else (asked.token,))
    logging.basicConfig(level=logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(RedactingFormatter(logging.Formatter(), redact))
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # at INFO it logs every URL
    try:
        load(asked)
        result = RowsResult()
    except BaseException as error:  # the outermost frame of this process
        found = failure_of(error, has_begun=asked.has_begun)
        log.exception("rows cannot be loaded: %s", found.code)
        failure = RowsFailure(
            owner=found.owner, code=found.code, message=redact(found.message), param=found.param
        )
        result = RowsResult(failure=failure)
    write_atomically(asked.result, result.model_dump_json().encode())


if __name__ == "__main__":
    main()

"""``python -m worker``: run one slot until SIGTERM."""

import gc

if __name__ == "__main__":
    # Imported objects all stay, and searching them for garbage takes a third of the start.
    gc.disable()

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import structlog

from dar.disk import PRIVATE
from dar.errors import ConfigurationError
from dar.settings import Settings, load_settings
from worker.app import Process
from worker.folders import SlotFolder
from worker.identity import slot_held
from worker.slot import Slot
from worker.supervisor.supervisor import TRAINER_COMMAND

log = structlog.get_logger(__name__)

EXIT_CONFIGURATION = 78


def start_logging(level: str) -> None:
    """Log one line per event to stderr, including those of libraries."""
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(stream=sys.stderr, level=max(number, logging.WARNING))


def worker_key(settings: Settings) -> str:
    """The key with which this worker claims jobs.

    Raises:
        ConfigurationError: It is not set.
    """
    key = settings.secret_from(settings.worker_key, "worker_key")
    if key is None:
        raise ConfigurationError(
            "no worker key: set DAR_WORKER_KEY, or start the service once, which writes "
            f"{settings.home / 'worker_key'}"
        )
    return key


def main(command: Sequence[str] = TRAINER_COMMAND) -> int:
    """Run one worker.

    Args:
        command: Command line of a trainer.

    Returns:
        The exit code: 0 after a clean stop, 78 for a wrong configuration.
    """
    os.umask(PRIVATE)
    try:
        settings = load_settings()
        start_logging(settings.log_level)
        key = worker_key(settings)
        folder = SlotFolder.of(settings.work_path, settings.slot)
        broker_url = None if settings.broker_url is None else settings.broker_url.get_secret_value()
        with slot_held(folder, settings.slot):
            slot = Slot(settings, key, folder, command)
            slot.introduce()
            log.info("worker waits for jobs", service=settings.service_url, slot=settings.slot)
            return Process(slot, broker_url).run()
    except ConfigurationError as error:
        sys.stderr.write(f"{error.message}\n")
        return EXIT_CONFIGURATION


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m worker",
        description="Run one worker: it trains one job at a time, until SIGTERM.",
        epilog="It takes its settings from DAR_* variables; docs/reference.md lists them.",
    ).parse_args()
    gc.freeze()
    gc.enable()
    sys.exit(main())

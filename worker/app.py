"""The Celery application: a message wakes the slot. Without a broker the slot only polls.

A message carries no data. It is acknowledged before the slot acts on it: redelivering a wake-up is
pointless, and a broker's visibility timeout would end long before a job of several days.
"""

import signal
import threading
from types import FrameType

import structlog
from celery import Celery
from celery.signals import celeryd_after_setup, setup_logging, worker_init, worker_shutting_down
from celery.worker import state as celery_state

from dar.protocol.worker import WAKE_QUEUE, WAKE_TASK
from worker.slot import Slot

log = structlog.get_logger(__name__)

SOCKET_SECONDS = 2.0
JOIN_SECONDS = 0.5


def make_app(broker_url: str, slot: Slot) -> Celery:
    """A Celery application whose only task wakes ``slot``."""
    app = Celery("worker", broker=broker_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "socket_timeout": SOCKET_SECONDS,
            "socket_connect_timeout": SOCKET_SECONDS,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
        result_backend=None,
        task_acks_late=False,
        task_default_queue=WAKE_QUEUE,
        task_ignore_result=True,
        task_serializer="json",
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_disable_prefetch=True,
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=1,
        worker_redirect_stdouts=False,
    )

    def wake() -> None:
        slot.run_next()

    app.task(name=WAKE_TASK)(wake)
    return app


class Process:
    """The worker process: a thread that polls, and with a broker Celery in the main thread."""

    def __init__(self, slot: Slot, broker_url: str | None) -> None:
        self._slot = slot
        self._broker_url = broker_url
        self._poll = threading.Thread(target=slot.poll, name="poll")

    def run(self) -> int:
        """Run until SIGTERM or SIGINT and the end of the running attempt; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._drain)
        code = 0
        if self._broker_url is None:
            self._poll.start()
        else:
            code = self._run_celery(self._broker_url)
            self._slot.drain.set()
        while self._poll.is_alive():
            self._poll.join(JOIN_SECONDS)  # in slices, so that signals are handled
        log.info("worker stopped", code=code)
        return code

    def _drain(self, number: int, _frame: FrameType | None) -> None:
        log.info("stopping: the running job writes a checkpoint and ends", signal=number)
        self._slot.drain.set()

    def _run_celery(self, broker_url: str) -> int:
        app = make_app(broker_url, self._slot)

        def start_polling(**_: object) -> None:
            self._poll.start()

        def drain(**_: object) -> None:
            self._slot.drain.set()

        def stop_if_too_early(**_: object) -> None:
            if self._slot.drain.is_set():  # the signal came before Celery handled it
                celery_state.should_stop = 0

        def keep_logging(**_: object) -> None:
            """A receiver of this signal keeps Celery from setting up its own logging."""

        worker_init.connect(start_polling, weak=False)
        worker_shutting_down.connect(drain, weak=False)
        celeryd_after_setup.connect(stop_if_too_early, weak=False)
        setup_logging.connect(keep_logging, weak=False)
        worker = app.Worker(
            pool="threads",
            concurrency=1,
            queues=[WAKE_QUEUE],
            quiet=True,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
        worker.start()
        return int(worker.exitcode or 0)

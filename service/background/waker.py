"""Wake-ups of workers over the broker: hints that may be lost, repeated or late.

A separate thread publishes, so that a broken broker never delays a request. It costs this thread
two seconds and a log line; workers find the job by polling.
"""

import threading

import structlog
from celery import Celery
from celery.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

from dar.protocol.worker import WAKE_QUEUE, WAKE_TASK

log = structlog.get_logger()
SOCKET_SECONDS = 2.0
MAX_WAITING = 64
"""Maximum number of wake-ups in the broker; more would have no effect."""


class Waker:
    """Publishes wake-ups. Without a broker it does nothing.

    Args:
        broker_url: ``redis://…`` of the broker, or None.
    """

    def __init__(self, broker_url: str | None) -> None:
        self._broker_url = broker_url
        self._wanted = 0
        self._changed = threading.Condition()
        self._is_closing = False
        self._celery = None if broker_url is None else _producer(broker_url)
        self._redis = None if broker_url is None else _redis(broker_url)
        self._thread = threading.Thread(target=self._run, name="waker", daemon=True)

    def start(self) -> None:
        if self._broker_url is not None:
            self._thread.start()

    def wake(self, count: int = 1) -> None:
        """Request ``count`` wake-ups. Returns at once."""
        with self._changed:
            self._wanted = min(self._wanted + count, MAX_WAITING)
            self._changed.notify()

    def check(self) -> str:
        """``ok``, ``off`` without a broker, or what is wrong. Takes at most two seconds."""
        if self._redis is None:
            return "off"
        try:
            self._redis.ping()
        except (RedisError, OSError) as error:
            return f"down: {error}; workers find jobs by polling"
        return "ok"

    def close(self) -> None:
        """Stop. Wake-ups that are not published yet are dropped."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * SOCKET_SECONDS)
        if self._celery is not None:
            self._celery.close()
        if self._redis is not None:
            self._redis.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._is_closing)
                if self._is_closing:
                    return
                count, self._wanted = self._wanted, 0
            try:
                self._publish(count)
            except (OperationalError, RedisError, OSError) as error:
                log.warning("broker takes no wake-ups; workers poll", error=str(error))
            except Exception:
                # Outermost frame of the thread: nothing would restart it.
                log.exception("wake-ups failed unexpectedly; workers poll")

    def _publish(self, count: int) -> None:
        assert self._celery is not None
        assert self._redis is not None
        waiting = int(self._redis.llen(WAKE_QUEUE))
        for _ in range(min(count, MAX_WAITING - waiting)):
            self._celery.send_task(WAKE_TASK, queue=WAKE_QUEUE, retry=False, ignore_result=True)


def _producer(broker_url: str) -> Celery:
    app = Celery("dar", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        broker_connection_retry=False,
        broker_connection_timeout=SOCKET_SECONDS,
        # Without these timeouts, a publish to a frozen broker was still blocked after 25 s.
        broker_transport_options={
            "socket_timeout": SOCKET_SECONDS,
            "socket_connect_timeout": SOCKET_SECONDS,
            "socket_keepalive": True,
            "max_retries": 0,
        },
    )
    return app


def _redis(broker_url: str) -> Redis:
    return Redis.from_url(
        broker_url, socket_timeout=SOCKET_SECONDS, socket_connect_timeout=SOCKET_SECONDS
    )

"""The stream of a job: frames out of bytes, and a connection that is opened again after a break."""

import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from dar.client.transport import MAX_BACKOFF_SECONDS, Backoff, Transport
from dar.client.waiting import Pause
from dar.errors import DARError
from dar.protocol.stream import StreamFrame

SILENCE_SECONDS = 60.0
"""Without a byte for so long the connection is dead: the service sends some every 15 s."""
OUTAGE_SECONDS = 300.0
"""How long a stream tolerates failures that may pass."""
END = "[DONE]"


class FrameDecoder:
    """Makes frames of server-sent events, from bytes in parts of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self.is_done = False
        """Whether the service has sent the end of the stream."""

    def feed(self, part: bytes) -> Iterator[StreamFrame]:
        """The frames that end in ``part``.

        Raises:
            DARError: A frame cannot be read.
        """
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            name, _, value = line.decode().rstrip("\r").partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            elif not name and not value and self._data:
                text, self._data = "\n".join(self._data), []
                if text == END:
                    self.is_done = True
                    return
                yield _parsed(text)


def _parsed(text: str) -> StreamFrame:
    try:
        return StreamFrame.model_validate_json(text)
    except ValidationError as error:
        raise DARError(
            "the service sent a frame that this version cannot read: "
            f"{error.errors()[0]['msg']}; update the client"
        ) from None


class FrameStream(Iterator[StreamFrame]):
    """The frames of a stream. `close` ends its connection before the stream ends.

    Args:
        steps: Frames, and pauses: before a connection is opened again, and of no time wherever
            something came that is no frame.
    """

    def __init__(self, steps: Generator[StreamFrame | Pause, None, None]) -> None:
        self.steps = steps

    def __next__(self) -> StreamFrame:
        while isinstance(step := next(self.steps), Pause):
            time.sleep(step.seconds)
        return step

    def close(self) -> None:
        """End the connection."""
        self.steps.close()


def follow(
    transport: Transport, path: str, params: Mapping[str, Any], from_seq: int
) -> FrameStream:
    """The frames of a stream, through restarts of the service, each once.

    Raises:
        DARError: For 300 s the service could not be reached, or it has returned an error.
    """
    return FrameStream(_steps(transport, path, params, from_seq))


def _steps(
    transport: Transport, path: str, params: Mapping[str, Any], from_seq: int
) -> Generator[StreamFrame | Pause, None, None]:
    last, backoff, answered = from_seq - 1, Backoff(MAX_BACKOFF_SECONDS), time.monotonic()
    while True:
        pause = None
        decoder = FrameDecoder()
        try:
            headers = {"accept": "text/event-stream", "last-event-id": str(last)}
            with transport.open(
                "GET", path, params=params, headers=headers, timeout=SILENCE_SECONDS
            ) as response:
                for part in response.iter_bytes():
                    answered = time.monotonic()
                    for frame in decoder.feed(part):
                        last, backoff = frame.seq, Backoff(MAX_BACKOFF_SECONDS)
                        yield frame
                    if decoder.is_done:
                        return
                    yield Pause(0)
        except DARError as error:
            if not error.retryable or time.monotonic() - answered > OUTAGE_SECONDS:
                raise
            pause = error.retry_after_seconds
        yield Pause(backoff.next(pause))

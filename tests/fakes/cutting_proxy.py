"""A network that breaks, or is slow: a proxy that forwards bytes."""

import socket
import threading
import time


class CuttingProxy:
    """Forwards bytes to a server of this machine.

    Args:
        port: The server's.
        cuts: How many of the first connections are cut.
        after: Bytes of a client after which its connection is cut.
        of_answers: Whether the bytes to the client are counted instead.
    """

    def __init__(
        self, port: int, *, cuts: int = 0, after: int = 0, of_answers: bool = False
    ) -> None:
        self._target = port
        self._cuts, self._after = cuts, after
        self._of_answers = of_answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = 0
        self.bytes_per_second: float | None = None
        """The most that each connection forwards in each direction; None: no limit."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def cuts_left(self) -> int:
        return self._cuts

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the server is away
                client.close()
                continue
            for source, sink in ((client, server), (server, client)):
                counts = (source is server) is self._of_answers
                threading.Thread(
                    target=self._pump, args=(source, sink, counts), daemon=True
                ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        passed = 0
        with source, sink:
            while data := self._receive(source):
                passed += len(data)
                if counts:
                    self.sent += len(data)
                    if self._cuts and passed > self._after:
                        self._cuts -= 1
                        break
                if self.bytes_per_second is not None:
                    time.sleep(len(data) / self.bytes_per_second)
                try:
                    sink.sendall(data)
                except OSError:
                    break
            for end in (source, sink):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    @staticmethod
    def _receive(source: socket.socket) -> bytes:
        try:
            return source.recv(64 * 1024)
        except OSError:
            return b""

    def close(self) -> None:
        self._listener.close()

"""One request to a hostile reward service, and the ways to answer it."""

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import Any

import orjson


@dataclass
class Exchange:
    """One request, and the connection to answer it on."""

    path: str
    argument: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int
    """How many requests this path has had, this one included."""
    connection: int
    """Which connection of the server it came on, from 1."""
    keeps: bool = False
    """Whether the connection goes on."""

    @property
    def request(self) -> dict[str, Any]:
        return dict(orjson.loads(self.body))

    @property
    def request_id(self) -> str:
        return str(self.request["request_id"])

    @property
    def ids(self) -> list[str]:
        return [sample["id"] for sample in self.request["samples"]]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(
        self, body: bytes, status: str = "200 OK", kind: str = "application/json", **headers: str
    ) -> None:
        """A well-framed answer; underscores in the names of headers become dashes."""
        given = {"content-type": kind, "content-length": str(len(body))}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in given.items())]
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        self.keeps = given.get("connection") != "close"

    async def text(self, text: str) -> None:
        """Exactly this text as the body of a 200, with the right request id for ``ID``."""
        await self.answer(text.replace("ID", self.request_id).encode())

    async def rewards(self, rewards: list[Any]) -> None:
        await self.answer(orjson.dumps({"request_id": self.request_id, "rewards": rewards}))

    async def results(self, results: list[dict[str, Any]]) -> None:
        await self.answer(orjson.dumps({"request_id": self.request_id, "results": results}))

    async def fine(self) -> None:
        """Rewards that tell which sample they are for: the digits of its id, over 8."""
        await self.rewards([reward_of(sample_id) for sample_id in self.ids])

    def reset(self) -> None:
        """End the connection with RST."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def reward_of(sample_id: str) -> float:
    """The reward that a conforming answer has for this sample."""
    return int("0" + "".join(ch for ch in sample_id if ch.isdigit())) / 8

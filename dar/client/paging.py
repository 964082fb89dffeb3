"""Lists that fetch their pages while they are iterated."""

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from dar.client.transport import Transport
from dar.protocol.base import Page

Item = TypeVar("Item")


class Listing(Generic[Item]):
    """All items of a list. Iterating requests page after page, each time anew.

    Args:
        transport: Connection to the service.
        path: Path of the list.
        answer: Model of one page.
        params: Query parameters; ``limit`` is the size of a page.
    """

    def __init__(
        self, transport: Transport, path: str, answer: type[Page[Item]], params: Mapping[str, Any]
    ) -> None:
        self._transport = transport
        self._path = path
        self._answer = answer
        self._params = params

    def page(self, after: str | None = None) -> Page[Item]:
        """One page: the first, or the one after the item with the id ``after``."""
        params = dict(self._params) if after is None else {**self._params, "after": after}
        return self._transport.get(self._path, self._answer, params)

    def __iter__(self) -> Iterator[Item]:
        page = self.page()
        yield from page.data
        while page.has_more and page.last_id is not None:
            page = self.page(page.last_id)
            yield from page.data

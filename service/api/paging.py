"""Query parameters and envelope of lists."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Literal, TypeVar

from fastapi import Depends, Query

from dar.errors import InvalidRequestError
from dar.protocol.base import Page
from service.store.paging import Cursor, Slice

Row = TypeVar("Row")
Item = TypeVar("Item")
MAX_LIMIT = 100


def cursor(
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Maximum number of items.")] = 20,
    after: Annotated[
        str | None, Query(description="Id of the last item of the previous page.")
    ] = None,
    before: Annotated[
        str | None, Query(description="Id of the first item of the next page.")
    ] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="Oldest or newest first.")] = "desc",
) -> Cursor:
    """The requested page.

    Raises:
        InvalidRequestError: Both ``after`` and ``before`` are given.
    """
    if after is not None and before is not None:
        raise InvalidRequestError(
            "after and before cannot be combined; send one of them",
            param="before",
            code="exclusive_fields",
        )
    return Cursor(limit=limit, after=after, before=before, order=order)


PageCursor = Annotated[Cursor, Depends(cursor)]
WithRewound = Annotated[
    bool,
    Query(
        description="Also what attempts reported of steps after the checkpoint from which a later "
        "attempt started, or with which the job has ended."
    ),
]


def envelope(
    found: Slice[Row], show: Callable[[Row], Item], identity: Callable[[Item], str]
) -> Page[Item]:
    data = [show(row) for row in found.rows]
    return Page[Item](
        object="list",
        data=data,
        has_more=found.has_more,
        first_id=identity(data[0]) if data else None,
        last_id=identity(data[-1]) if data else None,
    )


def whole(data: Sequence[Item], identity: Callable[[Item], str]) -> Page[Item]:
    """A complete list as one page."""
    return envelope(Slice(data, has_more=False), lambda item: item, identity)


def seconds(instant: datetime) -> int:
    """Seconds since 1970, as in OpenAI's objects."""
    return int(instant.timestamp())

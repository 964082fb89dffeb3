"""Keyset pagination: stable while rows are added, and as fast on the last page as on the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import ColumnElement, Select, literal, tuple_
from sqlalchemy.orm import InstrumentedAttribute

from dar.errors import InvalidRequestError
from service.store.database import Transaction

Row = TypeVar("Row")
Column = InstrumentedAttribute[Any]


@dataclass(frozen=True, slots=True)
class Cursor:
    """Selects a page of a list."""

    limit: int = 20
    after: str | None = None
    before: str | None = None
    order: Literal["asc", "desc"] = "desc"


@dataclass(frozen=True, slots=True)
class Slice(Generic[Row]):
    """The rows of a page, and whether more rows follow in the requested direction."""

    rows: Sequence[Row]
    has_more: bool


def page(
    transaction: Transaction,
    statement: Select[Row],
    identity: Column,
    keys: Sequence[Column],
    cursor: Cursor,
    *,
    edges: Select[Row] | None = None,
) -> Slice[Row]:
    """The rows of ``statement`` that ``cursor`` selects, in the order of ``keys``.

    Args:
        transaction: Where they are read.
        statement: All rows of the list.
        identity: The column of the cursor's id.
        keys: What the list is ordered by.
        cursor: The page.
        edges: Rows that the cursor may name, if these are more than the list has; a row may have
            left the list since a client saw it.

    Raises:
        InvalidRequestError: The cursor's id is not in this list.
    """
    is_backward = cursor.before is not None
    is_ascending = (cursor.order == "asc") is not is_backward
    edge = cursor.before or cursor.after
    if edge is not None:
        known = statement if edges is None else edges
        position = _position(transaction, known, identity, keys, edge, cursor)
        here: ColumnElement[Any] = tuple_(*keys)
        there = tuple_(*position)
        statement = statement.where(here > there if is_ascending else here < there)
    ordering = [key.asc() if is_ascending else key.desc() for key in keys]
    rows = transaction.scalars(statement.order_by(*ordering).limit(cursor.limit + 1)).all()
    kept = rows[: cursor.limit]
    return Slice(list(reversed(kept)) if is_backward else kept, len(rows) > cursor.limit)


def _position(
    transaction: Transaction,
    statement: Select[Row],
    identity: Column,
    keys: Sequence[Column],
    edge: str,
    cursor: Cursor,
) -> Sequence[ColumnElement[Any]]:
    found = transaction.execute(
        statement.where(identity == edge).with_only_columns(*keys)
    ).one_or_none()
    if found is None:
        name = "before" if cursor.before else "after"
        raise InvalidRequestError(
            f"{name}={edge!r} is not in this list; send the id of one of its items, or leave it out",
            param=name,
            code="invalid_cursor",
        )
    # Bound with the columns' types: SQLite compares an instant in the form that it stores.
    return [literal(value, key.type) for key, value in zip(keys, found, strict=True)]

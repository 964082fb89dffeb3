"""Which jobs of a project a list shows: filters that must all match."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, exists, func, or_, select

from dar.protocol.status import JobStatus
from service.store.database import Transaction
from service.store.tables import JobRow

ESCAPE = "\\"


@dataclass(frozen=True, slots=True)
class JobFilter:
    """What the jobs of a list have in common; None and empty: no condition."""

    status: JobStatus | None = None
    model: str | None = None
    """Of the model that is trained."""
    labels: Mapping[str, str | None] = field(default_factory=dict)
    """Their values by key; None: any value."""
    created_after: datetime | None = None
    created_before: datetime | None = None
    text: str | None = None
    """Part of the id, of the name of the model or the result, or of a label's value."""

    def conditions(self, transaction: Transaction) -> Iterator[ColumnElement[bool]]:
        """The conditions on `JobRow`, in the SQL of the transaction's database."""
        if self.status is not None:
            yield JobRow.status == self.status
        if self.model is not None:
            yield JobRow.model == self.model
        if self.created_after is not None:
            yield JobRow.created_at >= self.created_after
        if self.created_before is not None:
            yield JobRow.created_at < self.created_before
        for key, value in self.labels.items():
            pairs = _labels_of(transaction)
            same = [] if value is None else [pairs.c.value == value]
            yield exists(select(1).select_from(pairs).where(pairs.c.key == key, *same))
        if self.text is not None:
            pairs = _labels_of(transaction)
            columns = (JobRow.id, JobRow.model, JobRow.model_name)
            in_label = exists(
                select(1).select_from(pairs).where(_contains(pairs.c.value, self.text))
            )
            yield or_(*(_contains(column, self.text) for column in columns), in_label)


def _labels_of(transaction: Transaction) -> Any:  # noqa: ANN401 - SQLAlchemy's alias has no exact type
    # A JSON path would need the user's key quoted, so the key is compared as a value.
    unpack = func.json_each_text if transaction.is_postgresql else func.json_each
    return unpack(JobRow.labels).table_valued("key", "value")


def _contains(column: Any, text: str) -> ColumnElement[bool]:  # noqa: ANN401 - a column of either kind
    """Whether a text is in a column; upper and lower case count as the database compares them."""
    escaped = text
    for special in (ESCAPE, "%", "_"):
        escaped = escaped.replace(special, ESCAPE + special)
    found: ColumnElement[bool] = func.lower(column).like(func.lower(f"%{escaped}%"), escape=ESCAPE)
    return found

"""Names that users give to checkpoints: a promoted checkpoint is a model, and is kept."""

from collections.abc import Collection, Mapping

from sqlalchemy import ColumnElement, Select, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from service.store.database import Transaction
from service.store.tables import CheckpointRow, ModelAliasRow


def promote(transaction: Transaction, project_id: str, name: str, checkpoint_id: str) -> None:
    """Let a name stand for a checkpoint, which the transaction keeps from being removed.

    A name that stands for another one stands for this one from now on.
    """
    insert = postgresql.insert if transaction.is_postgresql else sqlite.insert
    statement = insert(ModelAliasRow).values(
        project_id=project_id,
        name=name,
        checkpoint_id=checkpoint_id,
        created_at=transaction.now,
    )
    transaction.execute(
        statement.on_conflict_do_update(
            index_elements=[ModelAliasRow.project_id, ModelAliasRow.name],
            set_={"checkpoint_id": checkpoint_id, "created_at": transaction.now},
        )
    )
    transaction.expire_all()


def find(transaction: Transaction, project_id: str, name: str) -> ModelAliasRow | None:
    """What a name stands for; None: it was given to no checkpoint of the project."""
    return transaction.get(ModelAliasRow, (project_id, name))


def remove(transaction: Transaction, project_id: str, name: str) -> bool:
    """Take a name back; its checkpoint stays. Returns whether there was such a name."""
    removed = transaction.execute(
        delete(ModelAliasRow)
        .where(ModelAliasRow.project_id == project_id, ModelAliasRow.name == name)
        .returning(ModelAliasRow.name)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    return removed is not None


def names_of(transaction: Transaction, checkpoint_ids: Collection[str]) -> Mapping[str, list[str]]:
    """The names of some checkpoints, sorted, by checkpoint; those without are left out."""
    rows = transaction.scalars(
        select(ModelAliasRow)
        .where(ModelAliasRow.checkpoint_id.in_(checkpoint_ids))
        .order_by(ModelAliasRow.name)
    ).all()
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row.checkpoint_id, []).append(row.name)
    return found


def promoted_ids() -> Select[str]:
    """Ids of all checkpoints that have a name."""
    return select(ModelAliasRow.checkpoint_id).correlate(None)


def is_promoted() -> ColumnElement[bool]:
    """Whether a checkpoint has a name."""
    return CheckpointRow.id.in_(promoted_ids())

"""Alembic's entry point. The service passes a connection; the command line uses the settings."""

from alembic import context
from sqlalchemy import Connection

from dar.settings import Settings
from service.store.database import Database
from service.store.tables import Base


def migrate(connection: Connection) -> None:
    """Run the migrations on ``connection``, each in its own transaction."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        # SQLite's DDL is transactional once its driver no longer begins transactions itself.
        transactional_ddl=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    database = Database(Settings().sqlalchemy_url)
    with database.engine.connect() as opened:
        migrate(opened)
    database.close()

"""Run by alembic: applies the migrations on the connection, and inside the transaction, that ``migrate`` hands in."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
)
context.run_migrations()

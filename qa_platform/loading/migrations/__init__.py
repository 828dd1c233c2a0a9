"""The tables, as a history of changes that alembic applies."""

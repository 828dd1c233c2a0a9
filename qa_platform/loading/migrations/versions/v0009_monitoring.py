"""Indexes for monitoring, whose statements would read all records."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE INDEX question_file_loaded ON question_file (loaded_at);
        CREATE INDEX question_file_failed ON question_file (source_file, generation) WHERE status = 'failed';
    """)

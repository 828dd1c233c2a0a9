"""The time since which a file has been deferred. The longer that is, the longer its waits."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        ALTER TABLE question_file ADD COLUMN put_off_since timestamptz;
        COMMENT ON COLUMN question_file.put_off_since IS 'since when something that is not the file''s fault keeps it from being answered';
    """)

"""Why a file was rejected, as fields. Files that were rejected before have only the text in ``error``."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        ALTER TABLE question_file ADD COLUMN rejection jsonb;
        COMMENT ON COLUMN question_file.rejection IS 'why a rejected file cannot be read, as fields; error has the text';
    """)

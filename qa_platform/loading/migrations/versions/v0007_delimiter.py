"""The delimiter of an upload. Its answered CSV has the same one."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        ALTER TABLE question_file ADD COLUMN delimiter text;
        COMMENT ON COLUMN question_file.delimiter IS 'of the upload; NULL where the file was not read since revision 0007';
    """)

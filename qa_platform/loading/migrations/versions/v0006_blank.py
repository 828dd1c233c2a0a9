"""How many blank rows of a file were skipped."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        ALTER TABLE question_file ADD COLUMN blank bigint;
        COMMENT ON COLUMN question_file.blank IS 'blank rows that were skipped; NULL where the file was not read since revision 0006';
    """)

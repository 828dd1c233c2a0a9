"""Which answered CSVs are still to be written to the bucket, and why one could not be."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        ALTER TABLE question_file ADD COLUMN csv_owed boolean NOT NULL DEFAULT false, ADD COLUMN csv_error text NOT NULL DEFAULT '';
        CREATE INDEX question_file_csv_owed ON question_file (created_at) WHERE csv_owed;
        COMMENT ON COLUMN question_file.csv_owed IS 'whether the answered CSV is still to be written to the bucket';
        COMMENT ON COLUMN question_file.csv_error IS 'why the answered CSV could not be written to the bucket; else empty';
    """)

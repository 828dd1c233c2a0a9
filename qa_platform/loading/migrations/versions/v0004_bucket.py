"""The MD5 of an upload, since equal size and CRC32C are not enough to call it unchanged; and why a source could not be archived."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        ALTER TABLE question_file ADD COLUMN md5 text NOT NULL DEFAULT '', ADD COLUMN archive_error text NOT NULL DEFAULT '';
        COMMENT ON COLUMN question_file.md5 IS 'MD5 of the upload; empty for composed objects, and for files from before it was recorded';
        COMMENT ON COLUMN question_file.archive_error IS 'why the source of a file that is done could not be archived; else empty';
    """)

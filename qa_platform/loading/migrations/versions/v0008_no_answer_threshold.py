"""The threshold beyond which the model was to say that there is no answer."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        ALTER TABLE question_file ADD COLUMN wanted_no_answer_threshold double precision;
        COMMENT ON COLUMN question_file.wanted_no_answer_threshold IS
            'how far "no answer" had to exceed the best answer; NULL where the model was not to say it';
    """)

"""The three tables, from nothing or around an existing `question_answer` with five columns and its rows."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Existing readers take the first five columns by position, and existing writers insert them. Names of files are keys: they are compared
# by their bytes, which is several times faster than by a language's rules.
_UP = """
CREATE TABLE IF NOT EXISTS question_answer (
    question varchar(10000),
    answer varchar(10000),
    context varchar(500000),
    model varchar(1000),
    qa_timestamp timestamp
);
ALTER TABLE question_answer
    ADD COLUMN score double precision,
    ADD COLUMN answer_start integer,
    ADD COLUMN answer_end integer,
    ADD COLUMN model_revision text,
    ADD COLUMN model_precision text,
    ADD COLUMN source_file text COLLATE "C",
    ADD COLUMN generation bigint,
    ADD COLUMN row_number bigint,
    ADD COLUMN load_id integer,
    ADD COLUMN run_id text,
    ADD COLUMN flag text,
    ADD COLUMN loaded_at timestamptz;
CREATE UNIQUE INDEX question_answer_source ON question_answer (source_file, row_number) WHERE source_file IS NOT NULL;
COMMENT ON COLUMN question_answer.qa_timestamp IS 'time of answering, UTC';
COMMENT ON COLUMN question_answer.score IS 'probability of the answer, 0 to 1';
COMMENT ON COLUMN question_answer.answer_start IS 'offset of the answer in the context, in characters from 0';
COMMENT ON COLUMN question_answer.answer_end IS 'end of the answer in the context, exclusive';
COMMENT ON COLUMN question_answer.source_file IS 'name of the file below incoming/';
COMMENT ON COLUMN question_answer.generation IS 'generation of the file that the row was written from';
COMMENT ON COLUMN question_answer.row_number IS 'data row of the file, from 1';
COMMENT ON COLUMN question_answer.flag IS 'low_score where the answer deserves a look';

CREATE TABLE question_answer_reject (
    source_file text COLLATE "C" NOT NULL,
    generation bigint NOT NULL,
    row_number bigint NOT NULL,
    line bigint,
    reason text NOT NULL,
    column_name text,
    detail text,
    raw text,
    load_id integer NOT NULL,
    rejected_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source_file, row_number)
);
COMMENT ON TABLE question_answer_reject IS 'rows of the loaded files that have no answer, and why';

CREATE TABLE question_file (
    source_file text COLLATE "C" NOT NULL,
    generation bigint NOT NULL,
    size bigint NOT NULL DEFAULT 0,
    crc32c text NOT NULL DEFAULT '',
    file_id text NOT NULL,
    partition_key text COLLATE "C" NOT NULL,
    status text NOT NULL DEFAULT 'pending',
    load_id integer NOT NULL DEFAULT 1,
    rows bigint NOT NULL DEFAULT 0,
    answered bigint NOT NULL DEFAULT 0,
    no_answer bigint NOT NULL DEFAULT 0,
    rejected bigint NOT NULL DEFAULT 0,
    claim_owner text,
    claim_until timestamptz,
    attempts integer NOT NULL DEFAULT 0,
    retry_at timestamptz,
    wanted_model text NOT NULL DEFAULT '',
    wanted_revision text NOT NULL DEFAULT '',
    wanted_precision text NOT NULL DEFAULT '',
    model text NOT NULL DEFAULT '',
    model_revision text NOT NULL DEFAULT '',
    model_precision text NOT NULL DEFAULT '',
    place text NOT NULL,
    pachyderm_commit text NOT NULL DEFAULT '',
    pachyderm_job text NOT NULL DEFAULT '',
    batch_id text NOT NULL DEFAULT '',
    dagster_run text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    answered_at timestamptz,
    loaded_at timestamptz,
    archived_at timestamptz,
    error text NOT NULL DEFAULT '',
    PRIMARY KEY (source_file, generation)
);
CREATE UNIQUE INDEX question_file_claim ON question_file (source_file) WHERE claim_owner IS NOT NULL;
CREATE INDEX question_file_partition ON question_file (partition_key, generation DESC);
CREATE INDEX question_file_open ON question_file (created_at) WHERE status IN ('pending', 'running');
CREATE INDEX question_file_unarchived ON question_file (created_at)
    WHERE archived_at IS NULL AND status IN ('loaded', 'rejected', 'unchanged');
CREATE INDEX question_file_created ON question_file (created_at DESC, generation DESC);
COMMENT ON TABLE question_file IS 'what happened to each generation of each file';
COMMENT ON COLUMN question_file.place IS 'name of the object that holds this generation now';
"""


def upgrade() -> None:
    op.execute(_UP)

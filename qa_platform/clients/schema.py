"""The columns of the two tables of rows: names, types and meanings, in the tables' order. `loading.migrations` creates them.

The columns of ``question_file`` are the ledger's own: see `ledger.records`.
"""

from dataclasses import dataclass

from qa_platform.contract import ANSWER_LIMIT, CONTEXT_LIMIT, MODEL_LIMIT, QUESTION_LIMIT


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        type: the type as PostgreSQL writes it.
        description: the meaning, for people.
    """

    name: str
    type: str
    description: str

    @property
    def base_type(self) -> str:
        """The type without its length."""
        return self.type.partition("(")[0]


@dataclass(frozen=True)
class Table:
    """A table of rows. A row is identified by file and row number.

    Args:
        columns: the columns that a load writes, in the table's order.
    """

    name: str
    columns: tuple[Column, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(column.name for column in self.columns)

    @property
    def base_types(self) -> dict[str, str]:
        """The types of the columns, without lengths, by name."""
        return {column.name: column.base_type for column in self.columns}


KEY = ("source_file", "row_number")

ANSWERS = Table(
    "question_answer",
    (
        Column("question", f"character varying({QUESTION_LIMIT})", "The question."),
        Column("answer", f"character varying({ANSWER_LIMIT})", "The piece of the context that answers the question."),
        Column("context", f"character varying({CONTEXT_LIMIT})", "The text that the answer is a piece of."),
        Column("model", f"character varying({MODEL_LIMIT})", "The model that answered."),
        Column("qa_timestamp", "timestamp without time zone", "Time of answering, UTC."),
        Column("score", "double precision", "Probability of the answer, 0 to 1."),
        Column("answer_start", "integer", "Offset of the answer in the context, in characters from 0."),
        Column("answer_end", "integer", "End of the answer in the context, exclusive."),
        Column("model_revision", "text", "Revision of the model: a commit of the hub, or a hash of the weights."),
        Column("model_precision", "text", "Arithmetic that the model was run with."),
        Column("source_file", "text", "Name of the file below incoming/; empty for rows that other programs wrote."),
        Column("generation", "bigint", "Generation of the file that the row was written from."),
        Column("row_number", "bigint", "Data row of the file, from 1."),
        Column("load_id", "integer", "How often this generation had been asked to be answered, from 1."),
        Column("run_id", "text", "The run that read the file."),
        Column("flag", "text", "low_score where the answer deserves a look."),
        Column("loaded_at", "timestamp with time zone", "When the row was written."),
    ),
)
REJECTS = Table(
    "question_answer_reject",
    (
        Column("source_file", "text", "Name of the file below incoming/."),
        Column("generation", "bigint", "Generation of the file that the row was written from."),
        Column("row_number", "bigint", "Data row of the file, from 1."),
        Column("line", "bigint", "Line of the file where the row begins, from 1; empty for rows that the model rejected."),
        Column("reason", "text", "Why there is no answer."),
        Column("column_name", "text", "The column that the reason concerns."),
        Column("detail", "text", "What exactly is wrong."),
        Column("raw", "text", "The row as it came, escaped and cut."),
        Column("load_id", "integer", "How often this generation had been asked to be answered, from 1."),
    ),
)

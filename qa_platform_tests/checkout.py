"""A folder like the project's, in which a test may do what a reader of the documentation does."""

import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
# A CSV of the reader's own: the README's `my.csv`. Its second row cannot be answered.
MY_CSV = "question,context\nWho built the bridge?,The bridge was built by Ada Blum in 1872.\nWho?,\n"

# And a gold set, with a question that has no answer.
GOLD_CSV = (
    'question,context,answers\nWho built the bridge?,The bridge was built by Ada Blum in 1872.,"[""Ada Blum""]"\n'
    "Who paid for it?,The bridge was built by Ada Blum in 1872.,\n"
)

_OWN = (".venv", ".qa", ".git", "my.csv", "gold.csv")


def make_checkout(folder: Path) -> Path:
    """Fill a folder with links to the project, whatever the tests run in as its `.venv`, `my.csv` and `gold.csv`; its `.qa` is its own."""
    for path in PROJECT.iterdir():
        if path.name not in _OWN:
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "my.csv").write_text(MY_CSV)
    (folder / "gold.csv").write_text(GOLD_CSV)
    return folder

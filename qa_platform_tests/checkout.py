"""A copy of the project's folder, in which a test can follow the documentation like a reader."""

import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
# The reader's own CSV: the README's `my.csv`. Its second row cannot be answered.
MY_CSV = "question,context\nWho built the bridge?,The bridge was built by Ada Blum in 1872.\nWho?,\n"

# A gold set, with a question that has no answer.
GOLD_CSV = (
    'question,context,answers\nWho built the bridge?,The bridge was built by Ada Blum in 1872.,"[""Ada Blum""]"\n'
    "Who paid for it?,The bridge was built by Ada Blum in 1872.,\n"
)

_OWN = (".venv", ".qa", ".git", "my.csv", "gold.csv")


def make_checkout(folder: Path) -> Path:
    """Fill a folder with links to the project, `my.csv` and `gold.csv`. `.venv` links to the tests' environment. There is no `.qa` yet."""
    for path in PROJECT.iterdir():
        if path.name not in _OWN:
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "my.csv").write_text(MY_CSV)
    (folder / "gold.csv").write_text(GOLD_CSV)
    return folder

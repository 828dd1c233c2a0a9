"""Reading from the tables: the answers, scores and rejects of files, and their reports."""

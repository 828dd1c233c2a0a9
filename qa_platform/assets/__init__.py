"""The three assets: `raw_questions`, `answered_questions`, `question_answer`."""

"""The assets: `raw_questions`, `answered_questions` and `question_answer`, `model_quality`."""

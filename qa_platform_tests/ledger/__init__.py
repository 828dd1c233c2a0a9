"""Tests of the table `question_file`."""

"""Measuring the quality of a model's answers, and choosing a precision by it."""

"""Measuring how good a model's answers are, and choosing a precision by it."""

"""Tests of what the tables say about a file."""

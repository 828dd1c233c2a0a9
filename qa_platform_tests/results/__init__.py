"""Tests of what the tables say of a file."""

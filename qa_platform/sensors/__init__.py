"""The sensors that find work."""

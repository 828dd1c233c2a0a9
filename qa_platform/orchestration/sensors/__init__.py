"""The sensors that find work and repair what was lost."""

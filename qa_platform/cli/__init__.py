"""The command line, `qa-platform`."""

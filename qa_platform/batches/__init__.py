"""The way of a batch of files: what waits, how it becomes a commit, its jobs, and what becomes of each file."""

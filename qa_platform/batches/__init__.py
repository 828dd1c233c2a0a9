"""The life of a batch of files: find pending files, commit them, follow the jobs, settle each file."""

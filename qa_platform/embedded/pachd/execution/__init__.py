"""Runs jobs, their datums, and the workers' processes. Independent of gRPC."""

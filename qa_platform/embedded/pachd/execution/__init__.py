"""What runs: jobs, their datums, and the processes of the workers. Knows nothing of gRPC."""

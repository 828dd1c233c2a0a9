"""The connections: the bucket, PostgreSQL, Pachyderm."""

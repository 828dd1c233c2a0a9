"""Tests of the clients: bucket, PostgreSQL, Pachyderm, credentials, schema."""

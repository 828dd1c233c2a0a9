"""Answered shards into PostgreSQL."""

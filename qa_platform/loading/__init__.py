"""Loading answered shards into PostgreSQL."""

"""What lies on disk: content-addressed chunks and trees, metadata, logs. Knows neither gRPC nor jobs."""

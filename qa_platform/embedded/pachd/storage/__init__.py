"""Storage on disk: content-addressed chunks and trees, metadata, logs. Independent of gRPC and jobs."""

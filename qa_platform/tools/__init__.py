"""Programs around the platform: benchmarks, documentation, the demonstration."""

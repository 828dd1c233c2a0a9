"""Programs beside the platform: benchmarks, documentation, the demonstration."""

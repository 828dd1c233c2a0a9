"""Training the bundled model."""

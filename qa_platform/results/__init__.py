"""What the tables say of a file."""

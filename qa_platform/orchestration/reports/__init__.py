"""What runs and sensors report to Dagster: the events of files, their checks, and the model's quality on gold sets."""

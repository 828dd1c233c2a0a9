"""The reports of runs and sensors to Dagster: the events of files, their checks, and the model's quality on gold sets."""

"""The platform in Dagster: assets, checks, jobs, sensors, and what a run reports of its files."""

"""The platform in Dagster: assets, checks, jobs, sensors, and the reports on files."""

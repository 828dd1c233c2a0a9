"""`qa-platform metrics`: figures for Prometheus, read from the services at each scrape.

`readings` reads the services and builds the metrics; `exporter` runs the readings in parallel, each with a deadline.
"""

"""`qa-platform metrics`: figures for Prometheus, read from the services at each scrape.

`readings` has what is read, and the metrics that are made of it; `exporter` reads all of it side by side, each within a deadline.
"""

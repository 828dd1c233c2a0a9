"""Injects faults into the whole platform while it works, and accounts for every row afterwards."""

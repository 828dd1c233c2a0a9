"""Faults, injected into the whole platform while it works, and the account of every row afterwards."""

"""Tests of loading: the gate, the load, the worker, the migrations."""

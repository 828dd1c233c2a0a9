"""The services of a deployment on one machine: PostgreSQL, a GCS emulator and a pachd on loopback, for laptops, tests and CI.

The rest of the platform cannot tell them from those of a deployment.
"""

"""The services that a deployment has, embedded: PostgreSQL, a GCS emulator and a pachd on loopback, for a laptop, tests and CI.

Nothing outside this package knows that they are embedded.
"""

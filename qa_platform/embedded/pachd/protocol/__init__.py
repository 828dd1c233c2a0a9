"""gRPC: translates messages of ``pachyderm_sdk`` to calls of ``pfs`` and ``pps``, and their results to messages."""

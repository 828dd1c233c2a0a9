"""gRPC in and out: messages of ``pachyderm_sdk`` become calls of ``pfs`` and ``pps``, and their results messages."""

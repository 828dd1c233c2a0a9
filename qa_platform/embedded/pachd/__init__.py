"""An embedded pachd: the part of Pachyderm's gRPC API that pipelines on one machine need, over a folder of state.

Three rooms: ``storage`` (chunks, trees, metadata, logs on disk), ``protocol`` (gRPC in and out, nothing else) and
``execution`` (jobs, datums, worker processes). Between them ``pfs`` and ``pps`` hold the rules of Pachyderm.
"""

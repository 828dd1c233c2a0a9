"""An embedded pachd: the part of Pachyderm's gRPC API that pipelines on one machine need, on a state folder.

``storage`` keeps chunks, trees, metadata and logs on disk. ``pfs`` and ``pps`` implement Pachyderm's rules. ``execution`` runs jobs, datums
and worker processes. ``protocol`` translates between gRPC and these.
"""

"""An embedded pachd: the part of Pachyderm's gRPC API that pipelines on one machine need, over a state folder.

``storage`` keeps chunks, trees, metadata and logs on disk. ``pfs`` and ``pps`` hold the rules of Pachyderm. ``execution`` runs jobs, datums
and worker processes. ``protocol`` translates between gRPC and these.
"""

"""A Google Cloud Storage emulator: the part of the JSON API that Google's client uses for buckets, objects, uploads and listings.

``python -m qa_platform.embedded.gcs --state DIR --address-file FILE [--token-file FILE]`` serves it. Clients find it through
``API_ENDPOINT_OVERRIDE=http://<address>``, and send the token as their credentials. An emulator without a token can also be found through
``STORAGE_EMULATOR_HOST``. `qa_platform.embedded.guard`, in front of the application, refuses requests from strangers.

It refuses what the real service refuses, as configured through the API itself: holds by a PATCH of the object; retention, soft delete,
versions and ``billing.requesterPays`` by a PATCH of the bucket; roles by the bucket's IAM policy. Every caller may do everything until the
policy has a binding of the member ``allUsers``. Then callers may do to objects what the roles of ``allUsers`` grant.

Modules: ``app`` routes requests; ``bucket_requests``, ``object_requests`` and ``uploads`` serve them; ``requests`` and ``resources``
translate between HTTP and values; ``storage`` has the semantics of objects, ``past`` those of generations that are no longer live,
``listing`` those of listings, ``buckets`` and ``settings`` those of buckets, ``policies`` the refusals, ``sessions`` resumable uploads;
``disk`` and ``rows`` store everything.

Not supported: the XML API with its multipart uploads, and encryption with customers' keys, which are only compared.

Why not a ready-made emulator: gcp-storage-emulator, the only one on PyPI, supports neither preconditions nor pages. It holds whole objects
in memory, rewrites its whole index at each change, and serves one request at a time. It maps object names to paths, so ``a`` and ``a/b``
cannot both exist, and a name of 256 characters is impossible.
"""

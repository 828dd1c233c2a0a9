"""A Google Cloud Storage emulator: the part of the JSON API that Google's client uses for buckets, objects, uploads and listings.

``python -m qa_platform.embedded.gcs --state DIR --address-file FILE [--token-file FILE]`` serves it. Clients find it through
``API_ENDPOINT_OVERRIDE=http://<address>``, and send the token as their credentials do; one without a token is also found through
``STORAGE_EMULATOR_HOST``. What others send is refused by `qa_platform.embedded.guard`, in front of the application.

It refuses what the real service refuses, and all of that is set through the API itself: holds by a PATCH of the object; retention,
soft delete, versions and ``billing.requesterPays`` by one of the bucket. Roles are set by the bucket's IAM policy: every caller may do
everything, until the policy has a binding of the member ``allUsers``; then callers may do to objects what the roles of ``allUsers`` grant.

Modules: ``app`` routes requests; ``bucket_requests``, ``object_requests`` and ``uploads`` serve them; ``requests`` and ``resources``
translate between HTTP and values; ``storage`` holds the semantics of objects, ``past`` those of generations that are no longer live,
``listing`` those of listings, ``buckets`` and ``settings`` those of buckets, ``policies`` what is refused, ``sessions`` resumable uploads;
``disk`` and ``rows`` know the files of all.

Not served: the XML API, with its multipart uploads; customers' keys are compared, and nothing is encrypted with them.

Why not a ready-made emulator: gcp-storage-emulator, the only one on PyPI, supports neither preconditions nor pages. It holds whole objects
in memory, rewrites its whole index at each change and serves one request at a time. It maps object names to paths, so that ``a`` and
``a/b`` exclude each other and a name of 256 characters is impossible.
"""

"""The ASGI application: routes requests to their handlers."""

import sqlite3
from http import HTTPStatus

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qa_platform.embedded.gcs.bucket_requests import BucketRequests
from qa_platform.embedded.gcs.disk import Disk, is_full
from qa_platform.embedded.gcs.model import StorageError
from qa_platform.embedded.gcs.object_requests import ObjectRequests
from qa_platform.embedded.gcs.policies import check_payer
from qa_platform.embedded.gcs.requests import Target, names_all_buckets, parse_path, payer, raw_path
from qa_platform.embedded.gcs.resources import error_response
from qa_platform.embedded.gcs.sessions import UploadSessions
from qa_platform.embedded.gcs.storage import Storage
from qa_platform.embedded.gcs.uploads import Uploads


class Emulator:
    """The application on one state folder."""

    def __init__(self, disk: Disk) -> None:
        self._storage = Storage(disk)
        self._buckets = BucketRequests(self._storage)
        self._objects = ObjectRequests(disk, self._storage)
        self._uploads = Uploads(disk, self._storage, UploadSessions(disk, self._storage))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            response = await self._response(request)
        except StorageError as error:
            response = error_response(error)
        except ClientDisconnect:
            return
        except (OSError, sqlite3.OperationalError) as error:
            if not is_full(error):
                raise
            # A status that clients do not retry.
            message = "The disk that holds this bucket is full."
            response = error_response(StorageError(HTTPStatus.INSUFFICIENT_STORAGE, "quotaExceeded", message))
        await response(scope, receive, send)

    async def _response(self, request: Request) -> Response:
        path = raw_path(request.scope)
        if path == "/":
            return Response("OK")
        if names_all_buckets(path):
            return await self._buckets.all(request)
        target = parse_path(path)
        self._check_payer(request, target)
        if not target.has_objects:
            return await self._buckets.one(request, target)
        if target.kind == "upload":
            return await self._uploads.handle(request, target)
        if target.name is None:
            return self._objects.list(request, target)
        if target.rest:
            return await self._objects.part(request, target, target.name)
        return await self._objects.one(request, target, target.name)

    def _check_payer(self, request: Request, target: Target) -> None:
        # A deleted bucket has no live settings. The payer of a resumable upload was checked when it began.
        of_deleted = not target.has_objects and (target.rest == ("restore",) or "softDeleted" in request.query_params)
        if not of_deleted and "upload_id" not in request.query_params:
            check_payer(self._storage.buckets.get(target.bucket), payer(request))

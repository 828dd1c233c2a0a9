"""Serves requests about buckets: their settings, policies, access control lists and managed folders."""

import re
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qa_platform.embedded.gcs.model import Bucket, Conditions, invalid, not_found
from qa_platform.embedded.gcs.policies import check_acl, granted, require
from qa_platform.embedded.gcs.requests import Target, conditions, flag, integer, json_body, not_implemented
from qa_platform.embedded.gcs.resources import bucket_etag, bucket_resource
from qa_platform.embedded.gcs.storage import Storage

_BUCKET_NAME = re.compile(r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]")
_ACLS = ("acl", "defaultObjectAcl")


class BucketRequests:
    """Serves requests about buckets."""

    def __init__(self, storage: Storage) -> None:
        self._buckets = storage.buckets

    async def all(self, request: Request) -> Response:
        """Requests to the collection of buckets."""
        if request.method == "GET":
            resources = [bucket_resource(bucket) for bucket in self._buckets.list(request.query_params.get("prefix", ""))]
            return JSONResponse({"kind": "storage#buckets", "items": resources})
        if request.method != "POST":
            raise not_implemented(request)
        settings = await json_body(request)
        name = settings.get("name")
        if not isinstance(name, str) or not _BUCKET_NAME.fullmatch(name):
            raise invalid(f"Invalid bucket name: {name!r}")
        if flag(request, "enableObjectRetention"):
            settings["objectRetention"] = {"mode": "Enabled"}
        return _shown(self._buckets.create(name, settings))

    async def one(self, request: Request, target: Target) -> Response:
        """Requests to one bucket."""
        if target.rest:
            return await self._part(request, target)
        name, holds = target.bucket, conditions(request, "if")
        match request.method:
            case "GET" if flag(request, "softDeleted"):
                return _shown(self._buckets.soft_deleted(name, integer(request, "generation")))
            case "GET":
                bucket = self._buckets.get(name)
                require(bucket, "storage.buckets.get")
                holds.check_metageneration(bucket.metageneration)
                return _shown(bucket)
            case "PATCH" | "PUT" as method:
                return _shown(await self._changed(request, name, replace=method == "PUT"))
            case "DELETE":
                self._buckets.delete(name, conditions=holds)
                return Response(status_code=HTTPStatus.NO_CONTENT)
        raise not_implemented(request)

    async def _changed(self, request: Request, name: str, *, replace: bool) -> Bucket:
        settings, holds = await json_body(request), conditions(request, "if")
        for acl in _ACLS:
            if settings.get(acl):
                check_acl(self._buckets.get(name), settings[acl])
        return self._buckets.change(name, settings, replace=replace, conditions=holds)

    async def _part(self, request: Request, target: Target) -> Response:
        """Requests to a part of a bucket, or for an operation on it."""
        name = target.bucket
        match request.method, target.rest:
            case "GET", ("iam", "testPermissions"):
                permissions = granted(self._buckets.get(name), request.query_params.getlist("permissions"))
                return JSONResponse({"kind": "storage#testIamPermissionsResponse", "permissions": permissions})
            case "GET", ("iam",):
                return _policy(self._buckets.get(name))
            case "PUT", ("iam",):
                return _policy(self._buckets.set_policy(name, await json_body(request)))
            case "POST", ("lockRetentionPolicy",):
                return _shown(self._buckets.lock_retention_policy(name, conditions=conditions(request, "if")))
            case "POST", ("restore",):
                return _shown(self._buckets.restore(name, integer(request, "generation")))
            case "GET", ("acl" | "defaultObjectAcl" as acl,):
                bucket = self._buckets.get(name)
                check_acl(bucket)
                return JSONResponse({"kind": "storage#bucketAccessControls", "items": bucket.settings.get(acl, [])})
            case _, ("managedFolders", *folder):
                return await self._folders(request, self._buckets.get(name), folder)
        raise not_implemented(request)

    async def _folders(self, request: Request, bucket: Bucket, path: list[str]) -> Response:
        folders: list[str] = bucket.settings.get("managedFolders", [])
        match request.method, path:
            case "POST", []:
                folder = f"{str((await json_body(request)).get('name', '')).rstrip('/')}/"
                self._buckets.change(bucket.name, {"managedFolders": [*folders, folder]}, replace=False, conditions=Conditions())
                return JSONResponse({"kind": "storage#managedFolder", "name": folder, "bucket": bucket.name})
            case "DELETE", [folder]:
                left = [other for other in folders if other.rstrip("/") != folder.rstrip("/")]
                if left == folders:
                    raise not_found(f"{bucket.name}/{folder}")
                self._buckets.change(bucket.name, {"managedFolders": left}, replace=False, conditions=Conditions())
                return Response(status_code=HTTPStatus.NO_CONTENT)
        raise not_implemented(request)


def _shown(bucket: Bucket) -> Response:
    return JSONResponse(bucket_resource(bucket))


def _policy(bucket: Bucket) -> Response:
    policy: dict[str, Any] = {"version": 1, "bindings": [], **bucket.policy}
    return JSONResponse(
        {"kind": "storage#policy", "resourceId": f"projects/_/buckets/{bucket.name}", "etag": bucket_etag(bucket), **policy}
    )

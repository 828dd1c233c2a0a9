"""The roles that the platform's user needs on a cluster with authentication, and which of them it lacks."""

from collections.abc import Collection
from dataclasses import dataclass

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import auth

from qa_platform.clients.pachyderm import is_code

PROJECT_WRITER, SECRET_ADMIN, REPO_WRITER = "projectWriter", "secretAdmin", "repoWriter"
_PROJECT = auth.Resource(type=auth.ResourceType.PROJECT, name="default")
_CLUSTER = auth.Resource(type=auth.ResourceType.CLUSTER)
_P = auth.Permission


@dataclass(frozen=True)
class Role:
    """A pachd role, the resource that it is bound to, and what the platform uses it for."""

    name: str
    resource: auth.Resource
    where: str
    purpose: str
    permissions: tuple[auth.Permission, ...]


ROLES = (
    Role(PROJECT_WRITER, _PROJECT, "project default", "repos and pipelines", (_P.PROJECT_LIST_REPO, _P.PROJECT_CREATE_REPO)),
    Role(
        SECRET_ADMIN,
        _CLUSTER,
        "cluster",
        "the pipelines' secrets",
        (_P.CLUSTER_CREATE_SECRET, _P.CLUSTER_LIST_SECRETS, _P.SECRET_INSPECT, _P.SECRET_DELETE),
    ),
    Role(REPO_WRITER, _CLUSTER, "cluster", "dropping and squashing commits", (_P.REPO_READ, _P.REPO_WRITE, _P.REPO_DELETE_COMMIT)),
)


def lacking_roles(client: Client) -> tuple[str, set[str]] | None:
    """The user of the token, such as ``robot:qa-platform``, and the names of the `ROLES` whose permissions it lacks.

    None if authentication is off. A different role with the same permissions counts too.
    """
    user, lacking = "", set()
    for role in ROLES:
        try:
            # Not GetPermissions, which leaves out the permissions on repos that a role on the cluster grants.
            reply = client.auth.authorize(resource=role.resource, permissions=list(role.permissions))
        except grpc.RpcError as error:
            if not is_code(error, grpc.StatusCode.UNIMPLEMENTED):
                raise
            return None
        user = reply.principal
        if not reply.authorized:
            lacking.add(role.name)
    return user, lacking


def grant_commands(user: str, lacking: Collection[str]) -> str:
    """The commands that grant a user the roles that it lacks.

    ``pachctl auth set`` replaces all of the user's roles on a resource. Therefore one command sets both roles on the cluster.
    """
    commands = []
    if PROJECT_WRITER in lacking:
        commands.append(f"pachctl auth set project default {PROJECT_WRITER} {user}")
    if {SECRET_ADMIN, REPO_WRITER} & set(lacking):
        commands.append(f"pachctl auth set cluster {SECRET_ADMIN},{REPO_WRITER} {user}")
    return " && ".join(commands)

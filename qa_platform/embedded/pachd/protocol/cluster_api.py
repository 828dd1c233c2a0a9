"""The services ``versionpb_v2.API`` and ``admin_v2.API``."""

from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import admin as pa
from pachyderm_sdk.api import version as pv

from qa_platform.contract import EMBEDDED_PACHD
from qa_platform.embedded.pachd.errors import NotFound
from qa_platform.embedded.pachd.pfs import Pfs
from qa_platform.embedded.pachd.protocol.rpc import Call, Method

_VERSION = pv.Version(major=2, minor=12, micro=2, additional=EMBEDDED_PACHD, platform="linux", go_version="none")


class ClusterApi:
    """Reports the version and the cluster. The cluster's id belongs to the state folder."""

    def __init__(self, pfs: Pfs, cluster_id: str) -> None:
        self._pfs = pfs
        self._cluster_id = cluster_id

    def methods(self) -> dict[str, Method]:
        """The methods by their full names."""
        return {
            "/versionpb_v2.API/GetVersion": Method(Empty.FromString, lambda request, call: _VERSION),
            "/admin_v2.API/InspectCluster": Method(pa.InspectClusterRequest.FromString, self.inspect_cluster),
        }

    def inspect_cluster(self, request: pa.InspectClusterRequest, call: Call) -> pa.ClusterInfo:
        warnings = []
        if request.current_project.name:
            try:
                self._pfs.project(request.current_project.name)
            except NotFound:
                warnings.append(f"The configured project {request.current_project.name!r} does not exist.")
        return pa.ClusterInfo(id=self._cluster_id, deployment_id=self._cluster_id, warnings_ok=True, warnings=warnings)

"""A release pushes all images or none, and each version only once: `.github/release` against a real registry."""

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from qa_platform_tests.flow import wait_until

RELEASE = Path(__file__).parents[1] / ".github" / "release"
IMAGES = ("one", "three", "two")
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a registry on this machine, which skopeo is told to trust."""
    program = shutil.which("docker-registry")
    if program is None or shutil.which("skopeo") is None:
        pytest.skip("no registry and skopeo on this machine (Debian and Ubuntu: apt-get install docker-registry skopeo)")
    home = tmp_path_factory.mktemp("registry")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = {"version": "0.1", "storage": {"filesystem": {"rootdirectory": str(home / "data")}}, "http": {"addr": address}}
    (home / "config.yml").write_text(json.dumps(config))
    trusted = home / ".config" / "containers" / "registries.conf"
    trusted.parent.mkdir(parents=True)
    trusted.write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
    with (
        (home / "log").open("wb") as log,
        subprocess.Popen([program, "serve", str(home / "config.yml")], stdout=log, stderr=log) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            patch.setenv("HOME", str(home))
            wait_until(lambda: _answers(f"http://{address}/v2/"), "the registry answers")
            yield address
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=10).ok
    except requests.ConnectionError:
        return False


def release(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RELEASE, *words], capture_output=True, text=True, env=dict(os.environ), timeout=60)


@dataclass(frozen=True)
class Built:
    """An OCI archive as the build writes it: an index of an image and of its attestation."""

    path: Path
    digest: str


def build(folder: Path, image: str, content: str, *, is_whole: bool = True) -> Built:
    blobs: dict[str, bytes] = {}

    def blob(data: bytes | dict[str, Any], media_type: str, **more: Any) -> dict[str, Any]:
        written = data if isinstance(data, bytes) else json.dumps(data).encode()
        digest = f"sha256:{hashlib.sha256(written).hexdigest()}"
        blobs[digest] = written
        return {"mediaType": media_type, "digest": digest, "size": len(written), **more}

    def manifest(layer: dict[str, Any], architecture: str, os: str) -> dict[str, Any]:
        platform = {"architecture": architecture, "os": os}
        config = blob({**platform, "rootfs": {"type": "layers", "diff_ids": []}}, "application/vnd.oci.image.config.v1+json")
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}
        return blob(document, MANIFEST, platform=platform)

    layer = blob(_tar({"file": content.encode()}), "application/vnd.oci.image.layer.v1.tar")
    provenance = blob({"predicateType": "https://slsa.dev/provenance/v1", "of": content}, "application/vnd.in-toto+json")
    manifests = [manifest(layer, "amd64", "linux"), manifest(provenance, "unknown", "unknown")]
    index = blob({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}, INDEX)
    if not is_whole:
        del blobs[layer["digest"]]
    files = {f"blobs/sha256/{digest.removeprefix('sha256:')}": data for digest, data in blobs.items()}
    files["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [index]}).encode()
    path = folder / f"{image}.tar"
    path.write_bytes(_tar(files))
    return Built(path, index["digest"])


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tags(address: str, owner: str) -> dict[str, Any]:
    """The tags that people see, by image."""
    answers = {image: requests.get(f"http://{address}/v2/{owner}/{image}/tags/list", timeout=10) for image in IMAGES}
    assert {answer.status_code for answer in answers.values()} <= {200, 404}
    return {image: answer.json().get("tags") for image, answer in answers.items()}


def test_all_images_are_pushed_as_they_were_built_and_a_version_is_released_once(registry: str, tmp_path: Path) -> None:
    target = f"{registry}/whole"
    built = {image: build(tmp_path, image, f"{image} 1") for image in IMAGES}
    archives = [each.path for each in built.values()]
    assert release("refuse", target, "v1", *IMAGES).returncode == 0
    pushed = release("push", target, "v1", *archives)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines() == [f"{target}/{image}:v1@{each.digest}" for image, each in built.items()]
    assert tags(registry, "whole") == {image: ["v1"] for image in IMAGES}

    # A job that is repeated changes nothing. Another build of the version is refused, before and by the push.
    assert release("push", target, "v1", *archives).stdout == pushed.stdout
    build(tmp_path, "two", "two, built again")
    again = release("push", target, "v1", *archives)
    assert (again.returncode, again.stdout) == (1, "")
    assert f"two:v1 was released before, as {built['two'].digest}" in again.stderr
    refused = release("refuse", target, "v1", *IMAGES)
    assert refused.returncode == 1
    assert "raise the version" in refused.stderr
    assert release("refuse", target, "v2", *IMAGES).returncode == 0


def test_if_one_image_cannot_be_pushed_none_is(registry: str, tmp_path: Path) -> None:
    target = f"{registry}/part"
    archives = [build(tmp_path, image, image, is_whole=image != "two").path for image in IMAGES]
    failed = release("push", target, "v1", *archives)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert not any(tags(registry, "part").values())
    # What went without a tag is in no way of the next try.
    build(tmp_path, "two", "two")
    assert release("push", target, "v1", *archives).returncode == 0
    assert tags(registry, "part") == {image: ["v1"] for image in IMAGES}


def test_a_registry_that_cannot_be_asked_is_not_taken_for_an_empty_one(registry: str) -> None:
    failed = release("refuse", "127.0.0.1:1/owner", "v1", "one")
    assert failed.returncode == 1
    assert "cannot be looked up" in failed.stderr

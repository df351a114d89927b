"""The default image, looked at from outside; no virtual machine is started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from instavm.node.images import Image, ImageStore
from instavm.node.images.rootfs import sparse_digest

SHOW = r"""
set -eu
mount -t tmpfs none "$2"
mkdir "$2/disk"
mount -o ro,loop "$1" "$2/disk"
mount -t proc proc "$2/disk/proc"
mount -t tmpfs none "$2/disk/tmp"
cat > "$2/disk/tmp/script"
export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin
exec env -i PATH=$PATH HOME=/tmp LANG=C.UTF-8 chroot "$2/disk" bash -eu /tmp/script
"""
TOOLS = """
curl wget git gcc g++ make ffmpeg convert sudo tmux ps ip ping less nano vi unzip zip xz
file jq rsync ssh strace lsof killall
"""


@pytest.fixture(scope="session")
def image(store: ImageStore) -> Image:
    return store.ensure_default()


@pytest.fixture
def inside(image: Image, tmp_path):
    """Runs a bash script in the image's tree, mounted read-only in a namespace that ends with it."""

    def run(script: str) -> str:
        argv = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            SHOW,
            "show",
            image.rootfs,
            tmp_path,
        ]
        done = subprocess.run(argv, input=script, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("program", ["python", "python3", "pip", "node", "npm"])
def test_languages_answer(inside, program):
    assert inside(f"{program} --version").strip()


def test_versions_are_new_enough(inside):
    python, node = inside("python -c 'import sys; print(sys.version_info[1])'; node -p process.versions.node").split()
    assert int(python) >= 11
    assert int(node.split(".")[0]) >= 18


def test_tools_are_there(inside):
    names = " ".join(TOOLS.split())
    assert inside(f"for name in {names}; do command -v $name >/dev/null || echo $name; done") == ""


def test_python_packages_are_there(inside):
    assert inside("python -c 'import httpx, requests, IPython, numpy, pandas, matplotlib'") == ""


def test_pip_installs_without_a_virtual_environment(inside):
    """The distribution's refusal (an "externally managed environment") is switched off for everyone."""
    answer = inside("pip install --dry-run --no-index pip 2>&1")
    assert "externally-managed" not in answer
    assert "already satisfied" in answer


def test_appuser_may_do_everything_without_a_password(inside):
    assert inside("id -u appuser; getent passwd appuser | cut -d: -f6-7; visudo -qc; sudo -l -U appuser | tail -1") == (
        "1000\n/home/appuser:/bin/bash\n    (ALL : ALL) NOPASSWD: ALL\n"
    )
    assert inside("stat -c '%U %a' /app /home/appuser") == "appuser 755\nappuser 755\n"


def test_locales_and_names_are_sane(inside):
    assert inside("locale -a | sort") == "C\nC.utf8\nPOSIX\nen_US.utf8\n"
    assert inside("getent hosts localhost | wc -l; cat /etc/hostname; wc -c < /etc/machine-id") == "1\nsandbox\n0\n"
    assert "nameserver" in inside("cat /etc/resolv.conf")


def test_nothing_of_the_build_or_its_host_is_left(inside):
    """No package lists, no caches, no settings of the host's apt, no foreign sources."""
    assert inside("find /var/lib/apt/lists /var/cache/apt/archives -type f -size +0") == ""
    assert inside("ls /etc/apt/apt.conf.d") == "01autoremove\n70debconf\n90sandbox\n"
    assert "Proxy" not in inside("apt-config dump Acquire::http")
    assert "debian" in inside("cat /etc/apt/sources.list")


def test_the_disk_is_sparse_and_has_the_size_asked_for(image: Image):
    assert image.size_bytes == image.rootfs.stat().st_size
    assert image.rootfs.stat().st_blocks * 512 == image.used_bytes < 4 << 30
    shown = subprocess.run(["dumpe2fs", "-h", image.rootfs], capture_output=True, text=True, check=True).stdout
    assert "instavm-root" in shown
    assert "has_journal" not in shown


def test_the_image_is_found_without_building(store: ImageStore, image: Image):
    assert store.find("default") == image
    assert store.find("other") is None
    assert image.workdir == "/app"
    assert image.env["LANG"] == "C.UTF-8"


def test_a_digest_of_a_sparse_file_sees_data_but_not_how_zeros_are_stored(tmp_path: Path):
    def file(name: str, write_zeros: bool, data: bytes = b"data") -> Path:
        path = tmp_path / name
        with path.open("wb") as out:
            out.write(b"\0" * (8 << 20)) if write_zeros else out.seek(8 << 20)
            out.write(data)
            out.truncate(32 << 20)
        return path

    assert sparse_digest(file("a", write_zeros=True)) == sparse_digest(file("b", write_zeros=False))
    assert sparse_digest(file("c", write_zeros=False, data=b"other")) != sparse_digest(file("d", write_zeros=False))

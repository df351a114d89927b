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
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from outer_machine import CPU, CPUS, MEMORY_MIB, Outer, command
from rig_parts import BUILDER, JOB_BYTES, OUTER, ROOT, Parts, RigFailed, sparse

from instavm.errors import InstaVMError
from instavm.node.images import recipes
from instavm.node.images.shelf import Shelf
from instavm.settings import Settings

__all__ = ["ROOT", "Done", "Rig", "RigFailed", "excused"]

TEMPLATES = Path(__file__).with_name("templates.py")
SCRATCH_GIB = 8
BOOT_S = 240.0
APPEND = "console=ttyS0 quiet reboot=t panic=-1 mitigations=off no_timer_check"

SLOW = {
    "INSTAVM_RESTORE_TIMEOUT_S": "120",
    "INSTAVM_PROBE_TIMEOUT_S": "120",
    "INSTAVM_TEST_PATIENCE": "5",
    "INSTAVM_KNOWN_BAD_VMM": "allow",
    "INSTAVM_TEST_CLOCK_MAY_JUMP": "1",
}
"""Settings for a host on which everything takes twenty times as long, with a Firecracker that no other host should have."""


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
        settings = settings or Settings()
        self._folder = settings.cache_dir / "tests" / "kvm"
        self._shelf = Shelf(self._folder)
        self._parts = Parts(settings, self._shelf, progress)
        self._progress = progress

    def prepare(self):
        """Build and boot whatever is not there yet; some minutes the first time."""
        parts = self._parts
        for made in (self._saved(), parts.root(), parts.images().parent, parts.emulator().parent):
            self._shelf.touch(made.name)
        self._shelf.prune(8, 86_400)

    def _saved(self):
        """The machine, booted and ready for a job: its memory, and the state of its devices."""
        made = self._parts
        parts = {"root": made.root().name, "images": made.images().parent.name, "emulator": made.emulator().parent.name}
        parts |= {"outer": recipes.tree_digest(OUTER), "memory": MEMORY_MIB, "job": JOB_BYTES, "builder": BUILDER}
        parts["processor"] = [CPU, CPUS]

        def make(work):
            self._progress("booting the outer machine")
            scratch, job = work.folder / "scratch", work.folder / "job"
            sparse(scratch, SCRATCH_GIB << 30)
            sparse(job, JOB_BYTES)
            sparse(work.folder / "memory", MEMORY_MIB << 20)
            initrd = work.folder / "initrd.cpio"
            initrd.write_bytes(self._parts.initrd())
            machine = self._machine(job, scratch, work.folder / "memory", share=True)
            boot = ("-kernel", self._parts.kernel().bzimage, "-initrd", initrd, "-append", APPEND)
            with Outer(work.folder, [*machine, *boot]) as outer:
                outer.until("ready", BOOT_S)
                outer.save(work.folder / "state")
            for name in ("scratch", "job", "qmp", "rig", "log", "initrd.cpio"):
                (work.folder / name).unlink(missing_ok=True)

        return self._shelf.ensure(recipes.key(parts), make, needs_bytes=2 << 30, progress=self._progress)

    def _machine(self, job, scratch, memory, *, share):
        parts = self._parts
        disks = ((parts.root() / "root.sqfs", True), (parts.images(), True), (job, True), (scratch, False))
        return command(parts.emulator(), disks, memory, share=share)

    def pytest(self, drivers, arguments, *, deadline_s, output=lambda text: None, env=None, **more):
        """Run tests of the project there, for these rows of the driver contract. Raises RigFailed."""
        how = ("pytest", "-v", "-p", "no:cacheprovider", "--rootdir=/job", f"--timeout={deadline_s:.0f}", "--tb=short")
        env = {"INSTAVM_TEST_DRIVERS": ",".join(drivers), **(env or {})}
        return self.run([*how, *arguments], deadline_s=deadline_s, env=env, output=output, **more)

    def templates(self, row, env, sizes, *, deadline_s, output=lambda text: None):
        """A scratch disk on which the templates of these sizes lie, for jobs with the same settings: they need not boot them.

        Raises RigFailed.
        """
        parts = {"saved": self._saved().name, "guest": self._parts.guest().system.parent.name, "env": env}
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
        saved = self._saved()
        env = {**SLOW, "INSTAVM_BOOT_TIMEOUT_S": str(deadline_s), **(env or {})}
        with self._bench() as folder:
            job, own = self._parts.job_disk(folder), folder / "scratch"
            if scratch is None:
                sparse(own, SCRATCH_GIB << 30)
                subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", own], check=True)
            else:
                subprocess.run(["cp", "--sparse=always", scratch, own], check=True)
            machine = self._machine(job, own, saved / "memory", share=False)
            with Outer(folder, [*machine, "-incoming", "defer"]) as outer:
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

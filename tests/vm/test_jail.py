"""A running VMM is confined as the documents say: each item is read from /proc and from the control groups."""

import contextlib
import os
import signal
import stat
from pathlib import Path

import anyio
import pytest

from instavm.client.isolation import verify
from instavm.contract.executions import Command
from instavm.contract.isolation import Tier
from instavm.contract.sandboxes import EndReason, SandboxSpec
from instavm.errors import IsolationTooWeak, SignatureError
from instavm.node.jail.cgroups import EMULATOR_MIB, PERIOD_US, TASKS, hierarchies

pytestmark = pytest.mark.anyio


def proc(sandbox):
    return Path(f"/proc/{sandbox.machine.pid}")


def status(sandbox):
    return dict(line.split(":\t", 1) for line in (proc(sandbox) / "status").read_text().splitlines() if ":\t" in line)


def home(sandbox):
    return sandbox.node._live[sandbox.vm_id].prepared.home


async def test_each_vmm_runs_as_a_uid_and_gid_of_its_own(start, node):
    uids = [status(await start())["Uid"].split() for _ in range(3)]
    assert all(len(set(four)) == 1 for four in uids), "real, effective, saved and file system uid are the same"
    first, count = node._settings.jail_uid_first, node._settings.jail_uid_count
    assert all(first <= int(four[0]) < first + count for four in uids)
    assert len({four[0] for four in uids}) == 3


async def test_it_has_no_rights_and_can_gain_none(sandbox):
    told = status(sandbox)
    assert {told[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert told["NoNewPrivs"] == "1"
    assert told["Groups"].split() == []
    assert told["Gid"].split() == told["Uid"].split()


async def test_its_system_calls_are_filtered_by_the_jail_and_by_qemu(sandbox):
    told = status(sandbox)
    assert (told["Seccomp"], told["Seccomp_filters"]) == ("2", "2")
    for thread in (proc(sandbox) / "task").iterdir():
        assert "Seccomp:\t2" in (thread / "status").read_text(), "every thread of it"


async def test_its_namespaces_are_its_own(sandbox, start):
    other = await start()
    for name in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
        its = (proc(sandbox) / "ns" / name).readlink()
        assert its != Path(f"/proc/self/ns/{name}").readlink(), name
        assert its != (proc(other) / "ns" / name).readlink(), name
    assert status(sandbox)["NSpid"].split()[-1] == "1", "it is the first of its own processes"


async def test_its_root_holds_what_it_needs_and_nothing_is_writable_but_its_own_folder(sandbox):
    mounts = {}
    for line in (proc(sandbox) / "mountinfo").read_text().splitlines():
        fields = line.split()
        mounts[fields[4]] = fields[5].split(",")
    writable = {at for at, options in mounts.items() if "rw" in options}
    assert writable == {str(home(sandbox)), "/proc", "/dev/null"}
    root = proc(sandbox) / "root"
    assert {path.name for path in root.iterdir()} <= {"dev", "etc", "lib", "lib64", "proc", "tmp", "usr", "var"}
    assert {path.name for path in (root / "usr/bin").iterdir()} == {"qemu-system-x86_64", "setpriv"}
    assert {path.name for path in (root / "dev").iterdir()} == {"null"}
    assert not (root / "bin").exists() and not (root / "sys").exists()


async def test_in_its_folder_it_may_write_to_one_file(sandbox):
    uid = int(status(sandbox)["Uid"].split()[0])
    about = home(sandbox).stat()
    assert (about.st_uid, stat.S_IMODE(about.st_mode)) == (0, 0o710)
    owned = {path.name for path in home(sandbox).iterdir() if path.lstat().st_uid == uid}
    assert owned == {"disk.qcow2"}
    assert all(path.lstat().st_mode & 0o077 == 0 for path in home(sandbox).iterdir())


async def test_it_holds_only_the_descriptors_it_needs(sandbox):
    files, others = {}, set()
    for entry in (proc(sandbox) / "fd").iterdir():
        target = str(entry.readlink())
        flags = int((proc(sandbox) / "fdinfo" / entry.name).read_text().split("flags:")[1].split()[0], 8)
        if target.startswith("/") and "memfd" not in target:
            files.setdefault(Path(target).name, set()).add(flags & os.O_ACCMODE != os.O_RDONLY)
        else:
            others.add(target.split("[")[0].split(":")[0])
    assert set(files) == {"null", "vmm.log", "disk.qcow2", "system.squashfs", "rootfs.ext4", "tun"}
    assert files["system.squashfs"] == files["rootfs.ext4"] == {False}
    assert others <= {"socket", "anon_inode", "/memfd"}
    sockets = [entry for entry in (proc(sandbox) / "fd").iterdir() if str(entry.readlink()).startswith("socket")]
    assert len(sockets) == 4, "its monitor and its agent, each listening and connected"


async def test_the_kernel_limits_what_one_process_may_use(sandbox, node):
    limits = {
        line[:25].strip(): line[25:].split()[:2] for line in (proc(sandbox) / "limits").read_text().splitlines()[1:]
    }
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max open files"] == ["256", "256"]
    assert limits["Max processes"] == [str(TASKS), str(TASKS)]
    assert node._settings.disk_gib << 30 <= int(limits["Max file size"][1]) < 2 * (16 << 30)


@pytest.mark.parametrize(("vcpus", "memory_mib"), [(2, 512), (1, 256)])
async def test_its_control_groups_hold_what_was_asked_for(start, node, vcpus, memory_mib):
    sandbox = await start(vcpus=vcpus, memory_mib=memory_mib)
    machine, cgroups = home(sandbox).name, node._jails.cgroups
    assert set(cgroups.paths(machine)) == {name for tree in hierarchies() for name in tree.controllers}
    for where in cgroups.paths(machine).values():
        assert str(sandbox.machine.pid) in (Path(where) / "cgroup.procs").read_text().split()
    set_to = cgroups.read(machine)
    quota = int((vcpus + 0.5) * PERIOD_US)
    memory = 2 * memory_mib + EMULATOR_MIB << 20
    versions = cgroups.controllers
    assert set_to["cpu.max" if versions["cpu"] == 2 else "cpu.cfs_quota_us"].split()[0] == str(quota)
    assert set_to["memory.max" if versions["memory"] == 2 else "memory.limit_in_bytes"] == str(memory)
    assert set_to["pids.max"] == str(TASKS)
    io = set_to["io.max" if versions["io"] == 2 else "blkio.throttle.write_bps_device"]
    assert str(node._settings.io_mib_per_s << 20) in io


async def test_who_computes_without_a_pause_gives_way_until_it_stops(start, node):
    busy, quiet = await start(), await start()
    if not (Path(node._jails.cgroups.paths(home(busy).name)["cpu"]) / "cpu.idle").exists():
        pytest.skip("this kernel knows no cpu.idle")

    def idle(sandbox):
        return (Path(node._jails.cgroups.paths(home(sandbox).name)["cpu"]) / "cpu.idle").read_text().strip()

    async def until(what):
        with anyio.fail_after(60):
            while idle(busy) != what:
                await anyio.sleep(0.05)

    await busy.bash("sh -c 'while :; do :; done' >/dev/null 2>&1 & echo $! > /tmp/busy")
    await until("1")
    assert idle(quiet) == "0"
    assert os.getpriority(os.PRIO_PROCESS, quiet.machine.pid) == 0
    await busy.bash("kill -9 $(cat /tmp/busy)")
    await until("0")


async def test_nothing_of_a_jail_outlives_its_sandbox(start, node):
    sandbox = await start()
    machine, pid, uid = home(sandbox).name, sandbox.machine.pid, int(status(sandbox)["Uid"].split()[0])
    where = list(node._jails.cgroups.paths(machine).values())
    assert where and all(Path(one).is_dir() for one in where)
    await sandbox.stop()
    assert not any(Path(one).exists() for one in where)
    assert not Path(f"/proc/{pid}").exists()
    assert uid not in node._jails._uids._held


async def test_a_vmm_that_takes_more_memory_than_it_may_is_ended_with_the_reason(start, node):
    """The neighbours go on. Its limit is lowered under what it uses, since a guest can't make its VMM use that much."""
    sandbox, neighbour = await start(), await start()
    groups = node._jails.cgroups
    where = Path(groups.paths(home(sandbox).name)["memory"])
    two = groups.controllers["memory"] == 2
    now = int((where / ("memory.current" if two else "memory.usage_in_bytes")).read_text())
    (where / ("memory.max" if two else "memory.limit_in_bytes")).write_text(str(now + (24 << 20)))
    node.ended.clear()
    with pytest.raises(Exception, match="lost while the command ran"):
        await sandbox.python("kept = bytearray(300 << 20)\nfor at in range(0, len(kept), 4096): kept[at] = 1")
    with anyio.fail_after(10):
        while not node.ended:
            await anyio.sleep(0.02)
    assert [(end.vm_id, end.reason) for end in node.ended] == [(sandbox.vm_id, EndReason.OVER_LIMIT)]
    assert "more memory" in node.ended[0].detail
    assert (await neighbour.python("print(1)")).stdout == "1\n"


async def test_what_a_vmm_prints_goes_to_no_disk_and_stops_nobody(sandbox):
    """A FIFO of 64 KiB that nobody reads: what comes on top is lost."""
    log = home(sandbox) / "vmm.log"
    assert stat.S_ISFIFO(log.stat().st_mode)
    fd = os.open(f"/proc/{sandbox.machine.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    written = 0
    try:
        while written < 1 << 20:
            written += os.write(fd, b"x" * 4096)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)
    assert written <= 1 << 16
    assert log.stat().st_size == 0
    assert (await sandbox.python("print(1)")).stdout == "1\n"


async def test_the_report_says_what_the_kernel_says_and_is_signed(sandbox, node):
    told = await node.isolation(sandbox.vm_id)
    document = {"report": told.report, "signature": told.signature}
    report = verify(document, node._signer.public_key)
    assert (report["vm_id"], report["tier"], report["driver"], report["jail"]) == (
        sandbox.vm_id,
        "emulated",
        "qemu",
        "on",
    )
    info = await node.info()
    assert report["established_by"] == info.probe and info.probe, "the probe's own words, or who set it"
    process = report["process"]
    assert process["uid"] == [int(status(sandbox)["Uid"].split()[0])]
    assert set(process["capabilities"].values()) == {"0" * 16}
    assert (process["seccomp"], process["no_new_privileges"]) == ("filter", True)
    assert all(process["namespaces"][name]["own"] for name in ("mnt", "pid", "net", "ipc", "uts", "cgroup"))
    assert len(process["descriptors"]) == len(list((proc(sandbox) / "fd").iterdir()))
    assert len(report["weaker"]) == 1 and "emulator" in report["weaker"][0]
    assert str(node._settings.state_dir) not in str(process["descriptors"])
    parts = {part["name"]: part for part in report["parts"]}
    assert set(parts) == {"VMM", "firmware", "host kernel", "guest kernel"}
    assert parts["VMM"]["version"] == report["driver_version"] and parts["guest kernel"]["age_days"] >= 0
    assert report["known_bad_as_of"] >= "2026-11-30"
    with pytest.raises(SignatureError, match="altered"):
        verify({**document, "report": {**told.report, "tier": "kvm"}}, node._signer.public_key)


async def test_a_report_tells_of_a_vmm_that_lost_a_part_of_its_jail(sandbox, node):
    """Read, not remembered: moved out of its groups and given back a wider limit, it says so."""
    report = (await node.isolation(sandbox.vm_id)).report
    machine = home(sandbox).name
    assert any(machine in group for group in report["process"]["control_groups"].values())
    for tree in hierarchies():
        (tree.mount / "cgroup.procs").write_text(str(sandbox.machine.pid))
    report = (await node.isolation(sandbox.vm_id)).report
    assert not any(machine in group for group in report["process"]["control_groups"].values())
    assert any("not in its control groups" in weakness for weakness in report["weaker"])


async def test_a_sandbox_that_needs_kvm_is_not_started_on_less(node):
    if node.tier is Tier.KVM:
        pytest.skip("this host has KVM")
    with pytest.raises(IsolationTooWeak, match="kvm asked for, this host has emulated"):
        await node.start(SandboxSpec("vm-strict", 2, 512, require_isolation=Tier.KVM))
    assert "vm-strict" not in node._live
    await node.start(SandboxSpec("vm-content", 2, 512, require_isolation=Tier.EMULATED))
    assert (await node.execute("vm-content", Command("print(1)", "python", 60))).stdout == "1\n"
    await node.stop("vm-content")


async def test_killing_the_jailer_does_not_free_the_vmm(start, node):
    """bubblewrap waits outside for the VMM's end; without it the VMM is still confined, and still ended."""
    sandbox = await start()
    pid = sandbox.machine.pid
    os.kill(int(status(sandbox)["PPid"]), signal.SIGKILL)
    assert (await sandbox.python("print(1)")).stdout == "1\n"
    await sandbox.stop()
    with contextlib.suppress(FileNotFoundError):
        assert "State:\tZ" in Path(f"/proc/{pid}/status").read_text(), "at most for the host's init to reap"

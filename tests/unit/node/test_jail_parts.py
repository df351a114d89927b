"""The parts of a jail that can be looked at without one."""

import os
from pathlib import Path

import pytest

from instavm.errors import HostNotReady
from instavm.node.jail import bubblewrap, jail
from instavm.node.jail.bubblewrap import Walls
from instavm.node.jail.cgroups import Hierarchy, Limits, hierarchies, settings_of
from instavm.node.jail.uids import Uids
from instavm.settings import Settings

LIMITS = Limits(vcpus=2, memory_mib=512, io_bytes=1 << 28, io_operations=1000)
V1 = """
31 24 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
32 24 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 24 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
34 24 0:30 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio
35 24 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
"""


def arguments(**more):
    return bubblewrap.arguments(Walls("/usr/bin/qemu", Path("/state/m1"), **more), says=3, seccomp=5)


def test_as_root_the_vmm_gets_a_uid_of_its_own_and_loses_every_right():
    given = " ".join(arguments(uid=1234))
    assert "--reuid=1234 --regid=1234 --clear-groups --bounding-set=-all --inh-caps=-all" in given
    assert "--no-new-privs" in given and "--unshare-user" not in given


def test_without_root_the_namespaces_are_the_same_and_the_uid_is_ones_own():
    given = arguments(uid=None)
    assert {"--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--seccomp"} <= set(
        given
    )
    assert "--cap-add" not in given and bubblewrap.SETPRIV not in given


def test_only_its_own_folder_is_bound_writable_and_kvm_only_where_it_is_used():
    given = arguments(uid=1)
    assert [given[at + 1] for at, flag in enumerate(given) if flag == "--bind"] == ["/state/m1"]
    assert "/dev/kvm" not in given
    assert "/dev/kvm" in arguments(uid=1, devices=("/dev/kvm",))
    assert "--groups=107" in arguments(uid=1, devices=("/dev/kvm",), groups=(107,))


def test_controllers_are_found_in_hierarchies_of_version_1():
    found = {name: str(tree.mount) for tree in hierarchies(V1.strip()) for name in tree.controllers}
    assert found == {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct",
        "memory": "/sys/fs/cgroup/memory",
        "pids": "/sys/fs/cgroup/pids",
        "io": "/sys/fs/cgroup/blkio",
    }


def test_controllers_are_found_in_the_one_hierarchy_of_version_2(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    found = hierarchies(f"24 1 0:27 / {tmp_path} rw - cgroup2 cgroup2 rw")
    assert found == [Hierarchy(tmp_path, 2, ("cpu", "memory", "pids", "io"))]


@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_are_told_the_same_limits(version):
    tree = Hierarchy(Path("/x"), version, ("cpu", "memory", "pids", "io"))
    told = list(settings_of(tree, LIMITS, "8:0"))
    if version == 2:
        assert ("cpu.max", "250000 100000") in told
        assert ("memory.max", str(1280 << 20)) in told
        assert ("io.max", f"8:0 rbps={1 << 28} wbps={1 << 28} riops=1000 wiops=1000") in told
    else:
        assert ("cpu.cfs_quota_us", "250000") in told
        assert ("memory.limit_in_bytes", str(1280 << 20)) in told
        assert ("blkio.throttle.write_bps_device", f"8:0 {1 << 28}") in told
    assert ("pids.max", "160") in told


def test_a_controller_that_is_not_there_is_left_out():
    assert dict(settings_of(Hierarchy(Path("/x"), 2, ("pids",)), LIMITS, "8:0")) == {"pids.max": "160"}


def test_no_two_servers_of_a_host_give_out_the_same_uid(tmp_path):
    one, other = (Uids(1_999_000_000, 4, tmp_path / "locks") for _ in range(2))
    try:
        given = [server.lease() for server in (one, other, one, other)]
        assert sorted(given) == [1_999_000_000 + number for number in range(4)]
        for server in (one, other):
            with pytest.raises(HostNotReady, match="INSTAVM_JAIL_UID_COUNT"):
                server.lease()
        one.give_back(given[0])
        assert other.lease() == given[0]
    finally:
        one.close()
        other.close()


def test_a_uid_under_which_something_runs_is_never_given_out(tmp_path):
    uids = Uids(os.getuid(), 1, tmp_path / "locks")
    with pytest.raises(HostNotReady):
        uids.lease()
    assert uids.adopt(os.getuid()), "a server that takes over what runs under it may have it"
    assert not uids.adopt(os.getuid())
    uids.close()


def test_a_host_without_bubblewrap_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostNotReady, match="apt-get install bubblewrap"):
        jail.check(Settings())
    with pytest.raises(HostNotReady, match="apt-get install bubblewrap"), jail.Jails.open(Settings(state_dir=tmp_path)):
        pass


def test_a_host_where_bubblewrap_fails_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HostNotReady, match=r"No permissions.*INSTAVM_JAIL=off"):
        jail.check(Settings())


@pytest.mark.parametrize(
    ("mode", "gid", "groups"),
    [(0o666, 0, ()), (0o660, 107, (107,)), (0o600, 0, None), (0o660, 0, None), (0o600, 107, None)],
)
def test_kvm_is_opened_through_its_group_or_not_at_all(tmp_path, monkeypatch, mode, gid, groups):
    """A VMM is not root: a device that only root may open is named with the remedy, and nothing falls back."""
    device = tmp_path / "kvm"
    device.touch()
    os.chown(device, 0, gid)
    device.chmod(mode)
    monkeypatch.setattr(jail, "KVM_DEVICE", device)
    needs = jail.Needs(tmp_path, 1, 256, kvm=True)
    if groups is None:
        with pytest.raises(HostNotReady, match="chgrp kvm"):
            jail._kvm(needs)
    else:
        assert jail._kvm(needs) == ((str(device),), groups)

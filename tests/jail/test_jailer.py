"""What stands around Firecracker's jailer, as far as it can run without Firecracker."""

import os
import signal
import subprocess

from instavm.node.jail import jailer


def test_what_waits_for_a_firecracker_tells_its_status_and_ends_the_server_of_its_disk():
    """When the first process of a process namespace is gone, nobody can start another one in it: not even for a look."""
    with subprocess.Popen(["sleep", "600"]) as disk:
        told = {"IVM_FDS": "", "IVM_DISK": str(disk.pid), "IVM_UID": str(os.geteuid())}
        shell = ["bash", "--norc", "--noprofile", "-c", jailer._WAIT, "bash"]
        done = subprocess.run(
            ["unshare", "--pid", *shell, "sh", "-c", "exit 7"], env={**os.environ, **told}, timeout=60
        )
        assert done.returncode == 7
        assert disk.wait(60) == -signal.SIGKILL

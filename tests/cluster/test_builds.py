"""Snapshots built from OCI images, whole: fetched from a registry, built in a sandbox, booted, and what goes wrong on the way."""

import json
import signal
import socket
import subprocess
import time

import debian_made
import oci_made
import pytest
from builds import built, ended, started
from oci_made import busybox, entry, layer, layout
from servers import PROGRAM

from instavm.errors import ForbiddenError, SnapshotError
from instavm.node import inventory
from instavm.node.images.store import ImageStore
from instavm.node.registries import Known

NOTHING = inventory.Inventory(frozenset(), frozenset())


@pytest.fixture
def client(servers):
    servers.start(SPARE_MACHINES=0)
    return servers.client(auto_start_session=False)


def registries(client, settings):
    """Where the default image's package managers go: those of an image that is made of its files go there, too."""
    client.start_session()
    client.execute("1")  # its template has been asked
    client.kill()
    image = ImageStore(settings.cache_dir, settings.disk_gib).find("default")
    return [one.host for one in Known(settings.cache_dir / "registries").of(image.digest)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_everything_that_a_build_can_add(servers, settings, internet, tmp_path):
    """A Debian with apt, pip, npm and git in it, the real registries, and a git server out there."""
    servers.start(SPARE_MACHINES=0, EGRESS_DNS=json.dumps([internet.a]))
    client = servers.client(auto_start_session=False)
    real = registries(client, settings)
    assert len(real) >= 3
    internet.names(
        {name: sorted({one[4][0] for one in socket.getaddrinfo(name, 443, socket.AF_INET)}) for name in real}
        | {"git.test": [internet.a], "evil.test": [internet.a]}
    )
    repository = internet.repository("app", {"README": "from the repository\n"}, "trunk")
    image = layout(
        tmp_path / "layout", *debian_made.layers(), env=["FROM_IMAGE=1"], labels={"by": "test"}, packed="zstd"
    )
    args = {
        "extra_apt_packages": "hello",
        "extra_pip_packages": "iniconfig",
        "extra_npm_packages": "is-number",
        "git_clone_url": f"http://git.test{repository}",
        "git_clone_branch": "trunk",
        "envs": {"FROM_BUILD": "2"},
        "disk_size_gb": 2,
        "post_build_cmd": "mkdir /opt; hello > /opt/said; echo $FROM_IMAGE $FROM_BUILD >> /opt/said;"
        "python3 -c 'import socket; socket.create_connection((\"evil.test\", 80))' || echo closed >> /opt/said",
    }
    made, stages = client.snapshots.create(image, name="all", build_args=args), {}
    snapshot, log = ended(client, made.snapshot_id, stages)
    assert snapshot.status == "ready", log
    names = ["apt packages", "pip packages", "npm packages", "git clone", "post_build_cmd", "first start"]
    assert [name for name in stages if name in names] == names, "each was seen while it went on"
    assert sorted(stages.values()) == list(stages.values()) and "iniconfig" in log and "layers of zstd" in log
    vm = client.vms.create(snapshot_id=snapshot.snapshot_id)
    client.session_id = vm["session_id"]
    assert client.get_session_info()["start"]["cold"] is False, "ready means that it starts fast"
    shell = client.execute("cat /opt/said /app/repo/README; df -k / | tail -1", language="bash").stdout.splitlines()
    assert shell[:4] == ["Hello, world!", "1 2", "closed", "from the repository"]
    assert 1.5 * 2**20 < int(shell[4].split()[1]) < 2**21
    assert (
        client.execute("import iniconfig, os; print(iniconfig.__name__, os.environ['FROM_BUILD'])").stdout
        == "iniconfig 2\n"
    )
    node = client.execute("console.log(require('/usr/local/lib/node_modules/is-number')(5))", language="javascript")
    assert node.stdout == "true\n", node
    assert not client.get_session_egress()["allow_package_managers"], "what the build could reach its sandboxes can't"
    assert not [line for line in internet.seen if "evil.test" in line]


def test_an_image_of_a_registry_with_things_added_to_it(client, tmp_path, servers):
    """No Python, bash or node in it: a shell runs, and what is missing is told plainly."""
    reference = layout(tmp_path / "layout", busybox(), env=["FROM_IMAGE=1", "PATH=/bin:/odd"], labels={"by": "test"})
    with oci_made.registry(tmp_path / "registry") as address:
        oci_made.push(reference, f"{address}/team/box:1")
        args = {
            "envs": {"FROM_BUILD": "2"},
            "post_build_cmd": "echo building with $FROM_IMAGE; mkdir -p /opt; id > /opt/built",
        }
        snapshot, log = built(client, f"{address}/team/box:1", name="box", build_args=args)
        assert snapshot.status == "ready", log
        assert "building with 1" in log and "=> post_build_cmd" in log
        assert snapshot["oci_digest"].startswith("sha256:") and snapshot["labels"] == {"by": "test"}
        assert snapshot["build_args"] == {"env_keys": ["FROM_BUILD"], "post_build_cmd": args["post_build_cmd"]}
        again, log = built(client, f"{address}/team/box@{snapshot['oci_digest']}")
        assert again.status == "ready" and "on this host already" in log
        assert again["oci_digest"] == snapshot["oci_digest"] and again["shared_bytes"] > 0
        missing, log = built(client, f"{address}/team/box:none")
        assert missing.status == "failed" and "manifest unknown" in missing.last_error.lower()
        assert missing["error"] == missing["message"] == missing.last_error
    vm = started(client, snapshot.snapshot_id)
    shell = vm.execute("cat /opt/built; echo $FROM_IMAGE $FROM_BUILD $PATH; pwd", language="sh")
    assert shell.stdout == "uid=0(root) gid=0\n1 2 /bin:/odd\n/app\n", shell
    for language, word in (("python", "python3 or python"), ("bash", "bash"), ("javascript", "node or nodejs")):
        result = vm.execute("1", language=language)
        assert (result.exit_code, result.stderr) == (127, f"{word}: not found in this image\n")
    vm.vms.delete(vm.get_session_info()["vm_id"])
    command_line(servers, snapshot)
    for place in ("layers", "snapshots", "templates"):
        assert not [one for one in (servers.state / place).iterdir() if one.suffix != ".lock"], f"{place} are left"


def command_line(servers, snapshot):
    """What `instavm snapshot` says of that one and of a build that fails; with it everything is removed."""
    failing = [
        PROGRAM,
        "snapshot",
        "build",
        "127.0.0.1:1/nothing:there",
        "--cpu",
        "1",
        "--memory",
        "256",
        "--name",
        "no",
    ]
    failed = subprocess.run(failing, env=servers.env, capture_output=True, text=True, timeout=60)
    assert failed.returncode != 0 and "the build failed: " in failed.stderr and "=> fetch" in failed.stderr
    rows = json.loads(servers.run("snapshot", "ls", "--json"))
    assert {row["name"]: row["status"] for row in rows if row["name"]} == {"no": "failed", "box": "ready"}
    assert rows[0]["id"] == failed.stdout.strip(), "it was told which one it is, and the newest comes first"
    shown = servers.run("snapshot", "get", snapshot.snapshot_id).splitlines()
    assert f"oci_digest: {snapshot['oci_digest']}" in shown and "status: ready" in shown
    assert servers.run("snapshot", "gc", "--dry-run") == "there is nothing to remove"
    ids = [row["id"] for row in rows]
    assert servers.run("snapshot", "rm", *ids).splitlines() == [f"removed {one}" for one in ids]
    assert json.loads(servers.run("snapshot", "ls", "--json")) == []
    assert servers.run("snapshot", "gc") == "there is nothing to remove"


def test_an_image_with_python_and_one_with_a_single_program(client, tmp_path):
    """The server's own account may name images on its disk."""
    python = layout(tmp_path / "python", busybox(), oci_made.python(), env=["PATH=/usr/bin:/bin"])
    snapshot, log = built(client, python)
    assert snapshot.status == "ready", log
    vm = started(client, snapshot.snapshot_id)
    vm.execute("x = 41")
    assert vm.execute("x += 1; import json; print(json.dumps(x))").stdout == "42\n"
    vm.kill()
    single = layout(tmp_path / "single", layer(entry("echo", oci_made.static_program(), mode=0o755)))
    snapshot, log = built(client, single)
    assert snapshot.status == "ready", log
    vm = started(client, snapshot.snapshot_id)
    result = vm.execute("echo 1", language="sh")
    assert (result.exit_code, result.stderr) == (127, "sh: not found in this image\n")
    vm.kill()


def test_an_image_with_node_alone(client, tmp_path):
    snapshot, log = built(client, layout(tmp_path / "layout", busybox(), oci_made.node(), env=["PATH=/usr/bin:/bin"]))
    assert snapshot.status == "ready", log
    vm = started(client, snapshot.snapshot_id)
    vm.execute("const x = 41", language="javascript")
    told = vm.execute("console.log(x + 1, process.version)", language="javascript")
    assert told.stdout == f"42 v{oci_made.NODE.requirement.split('==')[1]}\n", told
    missing = vm.execute("1")
    assert (missing.exit_code, missing.stderr) == (127, "python3 or python: not found in this image\n")
    vm.kill()


def test_builds_that_fail_are_cancelled_or_lose_their_server_leave_nothing(client, tmp_path, servers):
    box = layout(tmp_path / "layout", busybox())
    failed, log = built(
        client, box, build_args={"post_build_cmd": "wget http://evil.test/; echo to the log; echo why >&2; exit 7"}
    )
    assert failed.status == "failed" and "post_build_cmd failed (exit code 7)" in failed.last_error
    assert failed.last_error.endswith("why [the build's network refused evil.test: see egress_policy]")
    assert "to the log" in log
    with pytest.raises(SnapshotError, match="is failed"):
        client.vms.create(snapshot_id=failed.snapshot_id)

    def building():
        made = client.snapshots.create(
            box, vcpu_count=1, memory_mb=256, build_args={"post_build_cmd": "echo begun; sleep 600"}
        )
        deadline = time.monotonic() + 120
        while "\nbegun" not in client.snapshots.logs(made.snapshot_id)["log"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return made.snapshot_id

    cancelled = building()
    with pytest.raises(SnapshotError, match="is building"):
        client.vms.create(snapshot_id=cancelled)
    assert client.snapshots.cancel(cancelled).last_error == "it was cancelled"
    lost = building()
    servers.end(signal.SIGKILL)
    servers.start(SPARE_MACHINES=0)
    told = client.snapshots.get(lost)
    assert (told.status, told.last_error) == ("failed", "the server ended while it was built; build it again")
    assert client.list_sandboxes() == [] or [client.kill(one["session_id"]) for one in client.list_sandboxes()]
    client.snapshots.delete(building())
    assert inventory.take(servers.state) == NOTHING
    assert not list((servers.state / "snapshots").iterdir())


def test_another_account_may_not_read_the_servers_disk_nor_others_snapshots(client, servers):
    key = servers.run("key", "create", "other", "--tenant", "other", "--json").split('"key": "')[1].split('"')[0]
    from instavm import InstaVM

    other = InstaVM(key, f"http://127.0.0.1:{servers.port}", auto_start_session=False)
    for reference in ("oci:/etc:x", "docker-archive:/etc/shadow"):
        with pytest.raises(ForbiddenError, match="oci_image"):
            other.snapshots.create(reference)
    made = client.snapshots.create("127.0.0.1:1/nothing:there")
    for call in (other.snapshots.get, other.snapshots.delete, other.snapshots.logs, other.snapshots.cancel):
        with pytest.raises(Exception, match="there is no snapshot"):
            call(made.snapshot_id)
    assert other.snapshots.list() == []
    assert ended(client, made.snapshot_id)[0].status == "failed"

"""Checks of the official client, run by its own Python: `python official_checks.py check_17_...`.

Every check ends what it made. IVM_BASE, IVM_KEY and IVM_KEY_LOW say where and who.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import requests

from instavm import (
    AuthenticationError,
    ExecutionError,
    ForbiddenError,
    InstaVM,
    InstaVMError,
    QuotaExceededError,
    RateLimitError,
    SessionError,
)

BASE, KEY, LOW = os.environ["IVM_BASE"], os.environ["IVM_KEY"], os.environ["IVM_KEY_LOW"]
ORIGIN = os.environ["IVM_ORIGIN"]


@contextmanager
def client(**more):
    c = InstaVM(more.pop("key", KEY), base_url=BASE, **more)
    try:
        yield c
    finally:
        if c.session_id:
            c.kill()


def refused(errors, **more):
    try:
        InstaVM(KEY, base_url=BASE, **more)
    except errors:
        return
    raise AssertionError(f"{more} was taken")


def is_uuid(text):
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def check_01_a_client_has_a_session():
    with client() as c:
        assert is_uuid(c.session_id)


def check_02_a_wrong_key():
    try:
        InstaVM("wrong", base_url=BASE)
    except AuthenticationError:
        return
    raise AssertionError("it was let in")


def check_04_status_of_a_live_session():
    with client() as c:
        c.execute("1")
        status = c.get_session_status()
        assert (status["exists"], status["vm_assigned"], status["vm_alive"]) == (True, True, True)
        assert status["vm_status"] == "active"
        assert 0 < status["expires_in_seconds"] <= 300
        assert status["vm_id"] and not is_uuid(status["vm_id"])


def check_05_active_until_killed():
    with client() as c:
        c.execute("1")
        assert c.is_session_active() is True
        session_id = c.session_id
        c.kill(session_id)
        c.session_id = session_id
        assert c.is_session_active() is False
        c.session_id = None


def check_06_a_sandbox_comes_by_itself():
    with client() as c:
        deadline = time.monotonic() + 30
        while True:
            status = c.get_session_status()
            assert status["exists"] is True
            if status["vm_id"] or time.monotonic() > deadline:
                break
            assert status["vm_assigned"] is False
            time.sleep(0.1)
        assert status["vm_assigned"] is True


def check_07_a_lifetime_runs_out():
    with client(timeout=20) as c:
        c.execute("1")
        time.sleep(22)
        status = c.get_session_status()
        assert status["vm_alive"] is False
        assert status["vm_status"] != "active"
        assert status["expires_in_seconds"] == 0


def check_09_kill_forgets_and_ends():
    with client() as c:
        c.execute("1")
        vm_id = c.get_session_status()["vm_id"]
        assert vm_id in [vm["vm_id"] for vm in c.vms.list()]
        answer = c.kill()
        assert answer["vm_id"] == vm_id
        assert c.session_id is None
        assert vm_id not in [vm["vm_id"] for vm in c.vms.list()]
        assert vm_id in [vm["vm_id"] for vm in c.vms.list_all_records()]


def check_11_sandboxes_by_metadata():
    one, two = uuid.uuid4().hex, uuid.uuid4().hex
    with client(metadata={"team": one, "suite": one}) as a, client(metadata={"team": two, "suite": one}) as b:
        found = a.list_sandboxes(metadata={"team": one})
        assert len(found) == 1
        assert found[0]["metadata"] == {"team": one, "suite": one}
        assert found[0].keys() >= {"sandbox_id", "metadata", "started_at", "status"}
        assert len(b.list_sandboxes(metadata={"suite": one})) == 2
        assert len(b.list_sandboxes(metadata={"suite": one}, limit=1)) == 1


def check_12_record_and_usage():
    with client() as c:
        assert c.get_session_info()["session_id"] == c.session_id
        c.execute("1")
        usage = c.get_usage()
        assert (usage["execution_count"], usage["session_id"]) == (1, c.session_id)


def check_15_lifetimes_out_of_range():
    with client(auto_start_session=False) as c:
        before = len(c.vms.list_all_records())
        refused((SessionError, ForbiddenError), timeout=10)
        refused((SessionError, ForbiddenError), timeout=90000)
        assert len(c.vms.list_all_records()) == before


def check_16_sizes_out_of_range():
    for more in ({"memory_mb": 128}, {"memory_mb": 9000}, {"cpu_count": 0}, {"cpu_count": 9}):
        refused((SessionError, ForbiddenError), **more)
    with client(cpu_count=3, memory_mb=256) as c:
        info = c.get_session_info()
        assert (info["vcpu_count"], info["memory_mb"]) == (3, 256)


def check_17_execute():
    with client() as c:
        result = c.execute("print(6*7)")
        assert (result["stdout"], result["stderr"], result["exit_code"]) == ("42\n", "", 0)
        for name in ("execution_time", "cpu_time"):
            assert isinstance(result[name], float) and result[name] >= 0


def check_18_variables_persist_and_do_not_leak():
    with client() as one, client() as two:
        one.execute("x = 42")
        assert one.execute("print(x)")["stdout"] == "42\n"
        result = two.execute("print(x)")
        assert "NameError" in result["stderr"]
        assert result["exit_code"] == 1


def check_19_as_many_cpus_as_asked_for():
    with client(cpu_count=4, memory_mb=4096) as c:
        assert c.execute("import multiprocessing; print(multiprocessing.cpu_count())")["stdout"] == "4\n"


def check_20_environment():
    with client(env={"DATABASE_URL": "postgres://x", "N": 5, "ON": True}) as c:
        assert c.execute("import os; print(os.getenv('DATABASE_URL'))")["stdout"] == "postgres://x\n"
        assert c.execute("echo $DATABASE_URL $N $ON", language="bash")["stdout"] == "postgres://x 5 true\n"
        assert "postgres" not in json.dumps(c.get_session_info())


def check_21_work_happens_in_app():
    with client() as c:
        assert c.execute("pwd", language="bash")["stdout"] == "/app\n"
        assert c.execute("import os; print(os.getcwd())")["stdout"] == "/app\n"


def check_22_an_exit_code_is_a_result():
    with client() as c:
        assert c.execute("exit 7", language="bash")["exit_code"] == 7


def check_26_much_output_on_both_streams():
    with client() as c:
        code = "import sys\nsys.stdout.write('o' * 5_000_000)\n_ = sys.stderr.write('e' * 1000)"
        result = c.execute(code)
        assert result["stdout"] == "o" * 5_000_000
        assert result["stderr"] == "e" * 1000


def check_28_a_timeout_is_a_result():
    with client() as c:
        c.execute("1")
        result = c.execute("sleep 30", language="bash", timeout=2)
        assert (result["exit_code"], result["timed_out"]) == (124, True)
        assert c.execute("print('ok')")["stdout"] == "ok\n"


def check_30_shell_from_python():
    with client() as c:
        assert c.execute("!echo hi")["stdout"] == "hi\n"


def check_31_what_the_image_has():
    with client() as c:
        result = c.execute("import sys; print(sys.version_info >= (3, 11))")
        assert result["stdout"] == "True\n"
        tools = "which python3 curl wget git gcc make ffmpeg && (which magick || which convert) && pip --version"
        assert c.execute(tools, language="bash")["exit_code"] == 0
        node = c.execute("node --version", language="bash")["stdout"]
        assert int(node.strip().lstrip("v").split(".")[0]) >= 18


def check_32_a_task():
    with client() as c:
        task = c.execute_async("sleep 2; echo done", language="bash")
        result = c.get_task_result(task["task_id"])
        assert result["stdout"] == "done\n"
        assert result.keys() == {"stdout", "stderr", "cpu_time", "created_at", "execution_time"}


def check_33_tasks_that_fail_or_are_asked_for_at_once():
    with client() as c:
        task = c.execute_async("echo out; echo err >&2; exit 3", language="bash")
        result = c.get_task_result(task["task_id"], poll_interval=1)
        assert (result["stdout"], result["stderr"]) == ("out\n", "err\n")
        raw = requests.get(f"{BASE}/v1/executions/{task['task_id']}", headers={"X-API-Key": KEY}).json()
        assert (raw["exit_code"], raw["status"], raw["is_complete"]) == (3, "failed", True)
        listed = requests.get(f"{BASE}/v1/executions/", headers={"X-API-Key": KEY}).json()
        assert task["task_id"] in [one["task_id"] for one in listed]


def check_33b_a_task_ends_with_its_sandbox():
    with client() as c:
        task = c.execute_async("sleep 86400", language="bash", timeout=604800)
        c.execute("1")
        c.kill()
        raw = requests.get(f"{BASE}/v1/executions/{task['task_id']}", headers={"X-API-Key": KEY}).json()
        deadline = time.monotonic() + 10
        while not raw["is_complete"] and time.monotonic() < deadline:
            time.sleep(0.05)
            raw = requests.get(f"{BASE}/v1/executions/{task['task_id']}", headers={"X-API-Key": KEY}).json()
        assert (raw["status"], raw["reason"]) == ("killed", "killed")


def check_35_an_unknown_language():
    with client() as c:
        try:
            c.execute("print(1)", language="cobol")
        except ExecutionError:
            return
        raise AssertionError("it was taken")


def check_36_a_file_goes_in_and_comes_out():
    data = os.urandom(1 << 20)
    Path("a.bin").write_bytes(data)
    with client() as c:
        answer = c.upload_file(str(Path("a.bin").absolute()), "/app/a.bin")
        assert (answer["remote_path"], answer["size"]) == ("/app/a.bin", len(data))
        told = c.execute("sha256sum a.bin", language="bash")["stdout"]
        assert told == f"{hashlib.sha256(data).hexdigest()}  a.bin\n"
        back = c.download_file("/app/a.bin")
        assert (back["content"], back["size"]) == (data, len(data))
        c.download_file("a.bin", "b.bin")
        assert Path("b.bin").read_bytes() == data


def check_38_a_relative_name_and_an_empty_file():
    with client() as c:
        c.execute("open('out.json', 'w').write('{\"ok\": true}'); open('empty', 'w').close()")
        assert c.download_file("out.json")["content"] == b'{"ok": true}'
        assert c.download_file("empty")["content"] == b""


def check_39_files_that_are_not_there():
    with client() as c:
        for path in ("/app/nope", "/app"):
            try:
                c.download_file(path)
            except InstaVMError:
                continue
            raise AssertionError(path)
        asked = {"filename": "/app/nope", "session_id": c.session_id}
        assert requests.post(f"{BASE}/download", data=asked, headers={"X-API-Key": KEY}).status_code == 404
        asked["filename"] = "/app"
        assert requests.post(f"{BASE}/download", data=asked, headers={"X-API-Key": KEY}).status_code == 400


def check_41_42_44_vms():
    with client(auto_start_session=False) as c:
        vm = c.vms.create(vm_lifetime_seconds=600, metadata={"a": "b"})
        assert vm["status"] == "active" and is_uuid(vm["session_id"]) and not is_uuid(vm["vm_id"])
        got = c.vms.get(vm["vm_id"])
        assert got == vm
        assert got["metadata"] == {"a": "b"}
        time.strptime(got["created_at"][:19], "%Y-%m-%dT%H:%M:%S")
        c.session_id = vm["session_id"]
        assert c.execute("print(1)")["stdout"] == "1\n"
        Path("x.txt").write_text("hello")
        c.upload_file("x.txt", "/app/x.txt")
        assert c.execute("cat x.txt", language="bash")["stdout"] == "hello"
        c.vms.update(vm["vm_id"], metadata={"c": "d"}, auto_suspend=True)
        got = c.vms.get(vm["vm_id"])
        assert (got["metadata"], got["auto_suspend"]) == ({"c": "d"}, True)
        c.vms.stage_env(vm["vm_id"], {"TOKEN": "s3cret"})
        assert c.execute("echo $TOKEN", language="bash")["stdout"] == "s3cret\n"
        assert c.execute("import os; print(os.environ['TOKEN'])")["stdout"] == "s3cret\n"
        assert c.vms.delete(vm["vm_id"]) == {"status": "terminated", "vm_id": vm["vm_id"]}
        c.session_id = None
        try:
            c.vms.delete(vm["vm_id"])
        except requests.HTTPError as exc:
            assert exc.response.status_code == 404
        else:
            raise AssertionError("deleted twice")
        assert c.vms.get(vm["vm_id"])["status"] == "killed"


def check_43_vm_without_waiting_and_in_a_session():
    with client(auto_start_session=False) as c:
        vm = c.vms.create(wait=False)
        assert vm["status"] in ("creating", "active")
        again = c.vms.create(session_id=vm["session_id"])
        assert (again["vm_id"], again["status"]) == (vm["vm_id"], "active")
        c.vms.delete(vm["vm_id"])


def check_45_suspend_and_resume():
    with client(auto_start_session=False) as c:
        vm = c.vms.create(auto_resume=False)
        c.session_id = vm["session_id"]
        c.execute("x = 42")
        assert c.vms.suspend(vm["vm_id"])["status"] == "suspended"
        assert c.vms.get(vm["vm_id"])["status"] == "suspended"
        assert vm["vm_id"] not in [one["vm_id"] for one in c.vms.list()]
        try:
            c.execute("print(x)")
        except ExecutionError:
            pass
        else:
            raise AssertionError("it ran while it was suspended")
        back = c.vms.resume(vm["vm_id"], wait=True)
        assert back["vm_id"] != vm["vm_id"] and back["status"] == "active"
        assert c.execute("print(x)")["stdout"] == "42\n"
        c.vms.update(back["vm_id"], auto_resume=True)
        c.vms.suspend(back["vm_id"])
        assert c.execute("print(x)")["stdout"] == "42\n"


def check_46_snapshots_and_clones():
    with client() as c:
        c.execute("open('/app/kept', 'w').write('kept')")
        vm_id = c.get_session_status()["vm_id"]
        made = c.vms.snapshot(vm_id, wait=True, name="mine")
        snapshot_id = made.get("id") or made.get("snapshot_id")
        assert made["status"] == "ready" and made["snapshot_id"] == snapshot_id
        listed = {one["id"]: one for one in c.snapshots.list()}
        assert listed[snapshot_id]["name"] == "mine" and snapshot_id in {
            one["id"] for one in c.snapshots.list(type="user")
        }
        assert c.snapshots.get(snapshot_id)["status"] == "ready"
        vm = c.vms.create(snapshot_id=snapshot_id)
        with client(auto_start_session=False) as other:
            other.session_id = vm["session_id"]
            assert other.execute("print(open('/app/kept').read())")["stdout"] == "kept\n"
        cloned = c.vms.clone(vm_id, wait=True)
        assert cloned["status"] == "active" and cloned["vm_id"] != vm_id and cloned["snapshot_deleted"] is True
        with client(auto_start_session=False) as other:
            other.session_id = cloned["session_id"]
            assert other.execute("print(open('/app/kept').read())")["stdout"] == "kept\n"
        c.snapshots.delete(snapshot_id)
        try:
            c.snapshots.get(snapshot_id)
        except requests.HTTPError as exc:
            assert exc.response.status_code == 404
        else:
            raise AssertionError("it is still there")


def check_47_a_build_that_fails_is_told():
    with client(auto_start_session=False) as c:
        made = c.snapshots.create(oci_image="127.0.0.1:1/no/such:image", name="x", build_args={"envs": {"A": "b"}})
        deadline = time.monotonic() + 60
        while (got := c.snapshots.get(made["id"]))["status"] not in ("ready", "failed", "error"):
            assert time.monotonic() < deadline, got
            time.sleep(0.2)
        assert got["status"] == "failed" and got["last_error"] == got["error"] == got["message"]
        c.snapshots.delete(made["id"])


def check_50_limits_are_told_in_words():
    try:
        InstaVM(LOW, base_url=BASE, timeout=61)
    except ForbiddenError as exc:
        assert "vm lifetime cannot exceed 60s" in str(exc)
    else:
        raise AssertionError("a lifetime above the quota was taken")
    with client(key=LOW, timeout=60):
        try:
            InstaVM(LOW, base_url=BASE, timeout=60)
        except (ForbiddenError, QuotaExceededError) as exc:
            assert "1 sandboxes" in str(exc)
        else:
            raise AssertionError("a second sandbox was given")


def check_51_api_keys():
    with client(auto_start_session=False) as c:
        made = c.api_keys.create(description="mine")
        assert isinstance(made["id"], int) and made["key"] == made["api_key"]
        assert [k["description"] for k in c.api_keys.list() if k["id"] == made["id"]] == ["mine"]
        assert all("key" not in k for k in c.api_keys.list())
        assert c.api_keys.update(made["id"], description="other")["description"] == "other"
        assert c.api_keys.get(made["id"])["description"] == "other"
        with client(key=made["key"], auto_start_session=False) as mine:
            assert mine.get_current_user().keys() == {"id", "email", "name", "is_verified"}
            c.api_keys.delete(made["id"])
            try:
                mine.get_current_user()
            except AuthenticationError:
                return
            raise AssertionError("a revoked key was taken")


def check_52_app_url():
    """No address is told that nobody serves."""
    with client() as c:
        c.execute("1")
        try:
            c.get_session_app_url(port=3000)
        except InstaVMError as exc:
            assert "501" in str(exc), exc
        else:
            raise AssertionError("an address for a port that is not served")


def check_53_a_session_killed_runs_nothing():
    with client() as c:
        session_id = c.session_id
        c.kill()
        c.session_id = session_id
        try:
            c.execute("print(1)")
        except ExecutionError:
            c.session_id = None
            return
        raise AssertionError("a killed session ran code")


def check_54_one_vm_for_one_idempotency_key():
    headers = {"X-API-Key": KEY, "Idempotency-Key": uuid.uuid4().hex}
    with client(auto_start_session=False) as c:
        answers = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(requests.post(f"{BASE}/v1/vms", json={"memory_mb": 256}, headers=headers))
            )
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {a.status_code for a in answers} == {200}
        assert len({a.json()["vm_id"] for a in answers}) == 1
        assert requests.post(f"{BASE}/v1/vms", json={"memory_mb": 512}, headers=headers).status_code == 409
        c.vms.delete(answers[0].json()["vm_id"])


def check_67_the_command_line():
    cli = str(Path(sys.executable).with_name("instavm"))

    def instavm(*arguments):
        done = subprocess.run(
            [cli, *arguments, "--api-key", KEY, "--base-url", BASE], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert json.loads(instavm("whoami", "--json"))
    created = json.loads(instavm("create", "--json"))
    vm_id, session_id = created["vm_id"], created["session_id"]
    assert vm_id in instavm("ls", "--json")
    result = json.loads(instavm("exec", "--cmd", "print(1)", "--session", session_id, "--json"))
    assert result["stdout"] == "1\n"
    task = json.loads(instavm("exec", "--cmd", "print(2)", "--session", session_id, "--async", "--json"))
    told = json.loads(instavm("exec", "result", task["task_id"], "--json"))
    assert told["stdout"] == "2\n"
    assert vm_id in instavm("rm", vm_id, "--json")
    assert vm_id not in instavm("ls", "--json")


def check_69_as_the_javascript_client_does():
    headers = {"X-API-Key": KEY}
    first = requests.post(f"{BASE}/execute", json={"code": "x=42"}, headers=headers).json()
    body = {"code": "print(x)", "session_id": first["session_id"]}
    assert requests.post(f"{BASE}/execute", json=body, headers=headers).json()["stdout"] == "42\n"
    killed = requests.post(f"{BASE}/kill", json={"session_id": first["session_id"]}, headers=headers)
    assert killed.json()["status"] == "killed"


def check_99_error_shapes():
    headers = {"X-API-Key": KEY}
    for method, path, status in (
        ("GET", f"/v1/sessions/session/{uuid.uuid4()}", 404),
        ("GET", "/v1/vms/vm-aaaaaaaaaa", 404),
        ("GET", "/v1/executions/tsk_none", 404),
        ("GET", "/v1/api-keys/999999", 404),
        ("GET", "/v1/nothing", 404),
    ):
        answer = requests.request(method, BASE + path, headers=headers)
        assert answer.status_code == status
        assert isinstance(answer.json()["detail"], str)
    refused_body = requests.post(f"{BASE}/v1/sessions/session", json={"memory_mb": 1}, headers=headers)
    assert refused_body.status_code == 422
    assert {"loc", "msg", "type"} <= refused_body.json()["detail"][0].keys()
    assert issubclass(RateLimitError, InstaVMError)


def fetched(c, url):
    """The status, or 000 and curl's error."""
    command = "curl -sk -m 20 -o /dev/null -w '%{http_code}' " + url + '; echo " $?"'
    return c.execute(command, language="bash")["stdout"].split()


def check_60_egress_is_closed():
    with client() as c:
        for target in (f"{ORIGIN}/80", "1.1.1.1/443"):
            done = c.execute(f"timeout 5 bash -c '</dev/tcp/{target}'", language="bash")
            assert done["exit_code"] == 1, "refused, and not by running out of time"
        told = c.get_session_egress()
        assert told["allow_http"] is False and told["allow_https"] is False and told["allowed_domains"] == []


def check_61_egress_by_name():
    with client() as c:
        given = {"allow_http": True, "allow_https": False, "allowed_domains": ["origin.test"], "allowed_cidrs": []}
        c.set_session_egress(allow_package_managers=False, **given)
        assert fetched(c, "http://origin.test/") == ["200", "0"]
        assert fetched(c, "http://other.test/")[0] == "000"
        assert fetched(c, "https://origin.test/")[0] == "000"
        told = c.get_session_egress()
        assert {name: told[name] for name in given} == given
        assert told["allow_package_managers"] is told["allow_public_repos"] is False
        vm_id = c.get_session_info()["vm_id"]
        assert {name: c.get_vm_egress(vm_id)[name] for name in given} == given


def check_62_egress_by_range_until_it_is_closed():
    with client() as c:
        closed = {"allow_package_managers": False, "allow_http": False, "allow_https": False}
        c.set_session_egress(**closed, allowed_cidrs=[f"{ORIGIN}/32"])
        opened = c.execute(
            f"import socket; s = socket.create_connection(('{ORIGIN}', 9999), 10); s.sendall(b'x'); print(s.recv(1))"
        )
        assert opened["stdout"] == "b'x'\n", opened
        c.set_session_egress(**closed)
        died = c.execute("try:\n    s.sendall(b'x'); print(s.recv(1) == b'')\nexcept OSError: print('dead')")
        assert died["stdout"] in ("dead\n", "True\n"), died
        assert fetched(c, f"http://{ORIGIN}/")[0] == "000"


def check_63_egress_from_the_first_moment():
    with client() as c:
        made = c.vms.create(
            wait=True,
            egress_policy={"allow_package_managers": False, "allow_http": True, "allowed_domains": ["origin.test"]},
        )
        told = c.get_vm_egress(made["vm_id"])
        assert told["allow_http"] is True and told["allowed_domains"] == ["origin.test"] and not told["allow_https"]
        c.vms.delete(made["vm_id"])
        refused_policy = None
        try:
            c.set_session_egress(allowed_cidrs=["10.0.0.1/8"])
        except InstaVMError as exc:
            refused_policy = exc
        assert refused_policy is not None


if __name__ == "__main__":
    globals()[sys.argv[1]]()

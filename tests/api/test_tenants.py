"""What belongs to one account is never visible to another: every operation of the document, with every foreign id and name."""

import json
import re

import httpx
import pytest

from instavm.control.openapi import description

MARK = "belongs-to-the-first-account"
OPERATIONS = [(method, path) for path, methods in description()["paths"].items() for method in methods]
PARAMETERS = {"session_id", "vm_id", "snapshot_id", "execution_id", "task_id", "key_id", "process_id"}
BODIES = {
    "/execute": {"command": "1"},
    "/execute/stream": {"command": "1"},
    "/execute_async": {"command": "1"},
    "/download": {"filename": "x"},
    "/v1/vms/{vm_id}/stage-env": {"entries": []},
    "/v1/sessions/{session_id}/processes": {"command": "true"},
    "/v1/sessions/{session_id}/processes/{process_id}/signal": {"signal": "TERM"},
    "/v1/snapshots": {"oci_image": "missing"},
    "/v1/egress/session/{session_id}/check": {"host": "a.example"},
    "/v1/egress/vm/{vm_id}/check": {"host": "a.example"},
}
"""What an operation needs to be understood: as its body, or as the query of a GET."""


@pytest.fixture(scope="module")
def theirs(server):
    """Everything that the first account has, by the name of the parameter that takes it, and all of it as words."""
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}) as http:
        vm = http.post("/v1/vms", json={"metadata": {"owner": MARK}}).json()
        session = vm["session_id"]
        task = http.post("/execute_async", json={"command": "1", "session_id": session}).json()["task_id"]
        with http.stream("POST", "/execute/stream", json={"command": "1", "session_id": session}) as response:
            execution = response.headers["X-Execution-Id"]
            response.read()
        snapshot = http.post(f"/v1/vms/{vm['vm_id']}/snapshot", json={"name": MARK}).json()["id"]
        key = http.post("/v1/api-keys/", json={"description": MARK}).json()["id"]
        yield {
            "session_id": session,
            "vm_id": vm["vm_id"],
            "snapshot_id": snapshot,
            "execution_id": execution,
            "task_id": task,
            "key_id": str(key),
            "process_id": "prc_0",
        }
        http.delete(f"/v1/snapshots/{snapshot}")
        http.delete(f"/v1/api-keys/{key}")
        http.delete(f"/v1/vms/{vm['vm_id']}")


@pytest.fixture
def other(server):
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.other_key}) as client:
        before = {vm["vm_id"] for vm in client.get("/v1/vms").json()}
        yield client
        for vm in client.get("/v1/vms").json():
            if vm["vm_id"] not in before:
                client.delete(f"/v1/vms/{vm['vm_id']}")
        for snapshot in client.get("/v1/snapshots").json():
            client.delete(f"/v1/snapshots/{snapshot['id']}")


def nothing_of(theirs, text):
    """None of their ids and words."""
    assert MARK not in text
    for name, value in theirs.items():
        assert name in ("key_id", "process_id") or value not in text, (name, text)


def test_every_parameter_in_a_path_is_one_that_is_tried():
    assert {name for _, path in OPERATIONS for name in re.findall(r"{(\w+)}", path)} == PARAMETERS


@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if "{" in one[1]])
def test_a_foreign_id_in_a_path_is_an_id_that_nobody_has(other, theirs, method, path):
    needed = BODIES.get(path, {})
    how = {"params": needed} if method == "get" else {"json": needed}
    answer = other.request(method, path.format(**theirs), **how)
    assert answer.status_code == 404, (answer.status_code, answer.text)
    sent = set(re.findall(r"{(\w+)}", path))
    nothing_of({name: value for name, value in theirs.items() if name not in sent}, answer.text)


@pytest.mark.parametrize("name", ["session_id", "snapshot_id"])
@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if one[0] == "post" and "{" not in one[1]])
def test_a_foreign_id_in_a_body_is_an_id_that_nobody_has(other, theirs, method, path, name):
    """Where the field is none of the operation's, it is ignored."""
    if path == "/upload":
        answer = other.post(path, data={"remote_path": "x", name: theirs[name]}, files={"file": b"x"})
    else:
        answer = other.post(path, json={**BODIES.get(path, {}), name: theirs[name]})
    fields = description()["paths"][path][method].get("requestBody")
    reads = f'"{name}"' in json.dumps(_schema(fields))
    if reads:
        assert answer.status_code == 404, (answer.status_code, answer.text)
    if answer.status_code == 200 and (
        session := answer.json().get("session_id") if path != "/execute/stream" else None
    ):
        assert session != theirs["session_id"]
        other.post("/kill", json={"session_id": session})
    if answer.status_code == 200 and path == "/v1/api-keys/":
        other.delete(f"/v1/api-keys/{answer.json()['id']}")


def _schema(body):
    if body is None:
        return {}
    document = description()
    (kind, *_) = body["content"].values()
    name = kind["schema"].get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else kind["schema"]


@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if one[0] == "get" and "{" not in one[1]])
def test_no_list_tells_of_another_account(other, theirs, method, path):
    """Whatever its parameters: each of them with each foreign id, name and metadata."""
    operation = description()["paths"][path][method]
    names = [one["name"] for one in operation.get("parameters", []) if one["in"] == "query"]
    values = [*theirs.values(), MARK, json.dumps({"owner": MARK}), "user", "failed", "active", "1000"]
    nothing_of(theirs, other.get(path).text)
    for name in names:
        for value in values:
            answer = other.get(path, params={name: value})
            assert answer.status_code in (200, 403, 422), answer.text
            if answer.status_code == 200:
                nothing_of(theirs, answer.text)


def test_what_is_cleared_up_tells_nothing_of_another_account(other, theirs):
    nothing_of(theirs, other.post("/v1/snapshots/garbage", params={"dry_run": True}).text)


def test_the_first_account_sees_all_of_it(http, theirs):
    """Or the tests above would find nothing to hide."""
    assert MARK in http.get("/v1/vms").text + http.get("/v1/sessions/sandboxes").text
    assert MARK in http.get("/v1/snapshots").text and MARK in http.get("/v1/api-keys/").text
    assert theirs["task_id"] in http.get("/v1/executions").text
    assert http.get(f"/v1/vms/{theirs['vm_id']}").status_code == 200

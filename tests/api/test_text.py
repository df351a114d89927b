"""All text that JSON can hold, in everything that a client can name: refused, or given back as it came; never a 500."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from instavm import limits
from instavm.contract.executions import Outcome

ANY = st.text(st.characters(), max_size=30) | st.sampled_from(["\ud800", "a\udfffb", "\0", "a\0b", "\u2028", "é", ""])
DEEP = "[" * 500 + "]" * 500
PATIENT = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def is_unicode(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sent(http, method, path, body):
    """As raw JSON with escapes, which is how a lone surrogate comes."""
    answer = http.request(
        method, path, content=json.dumps(body).encode("ascii"), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code < 500, (body, answer.text)
    answer.json()
    return answer


@pytest.fixture(scope="module")
def made(server):
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}) as http:
        vm = http.post("/v1/vms", json={}).json()
        server.before = set()
        yield vm
        http.delete(f"/v1/vms/{vm['vm_id']}")


@PATIENT
@given(st.dictionaries(ANY, ANY | st.lists(ANY, max_size=2) | st.floats(), max_size=3))
@example({"a": float("nan")})
@example({"\ud800": 1})
def test_metadata_comes_back_as_it_was_sent(vm, http, metadata):
    vm_id = vm.execute("1").vm_id
    answer = sent(http, "PATCH", f"/v1/vms/{vm_id}", {"metadata": metadata})
    whole = all(map(is_unicode, json.loads(json.dumps(metadata).replace("NaN", "0").replace("Infinity", "0"))))
    if answer.status_code == 200:
        assert answer.json()["metadata"] == http.get(f"/v1/vms/{vm_id}").json()["metadata"] == metadata
    else:
        assert (answer.status_code, answer.json()["field"]) == (422, "metadata")
        assert not (whole and metadata == {}), "what is whole is taken"


@PATIENT
@given(st.dictionaries(st.text("ABC_\0é\ud800", min_size=1, max_size=3), ANY, max_size=3))
def test_variables_are_taken_whole_or_refused(vm, http, env):
    answer = sent(http, "POST", f"/v1/vms/{vm.execute('1').vm_id}/stage-env", entries(env))
    fits = all(
        name.isascii() and "\0" not in name and is_unicode(value) and "\0" not in value for name, value in env.items()
    )
    assert answer.status_code == (200 if fits else 422)
    if fits:
        shown = vm.execute(f"import os, json; print(json.dumps({{n: os.environ[n] for n in {sorted(env)!r}}}))").stdout
        assert json.loads(shown) == env


def entries(env):
    return {"entries": [{"env_name": name, "value": value} for name, value in env.items()]}


@PATIENT
@given(ANY)
def test_the_name_of_a_snapshot_comes_back_as_it_was_sent(vm, http, name):
    answer = sent(http, "POST", f"/v1/vms/{vm.execute('1').vm_id}/snapshot", {"name": name})
    assert (answer.status_code == 200) == is_unicode(name)
    if answer.status_code == 200:
        made = answer.json()
        assert made["name"] == http.get(f"/v1/snapshots/{made['id']}").json()["name"] == name
        http.delete(f"/v1/snapshots/{made['id']}")


@PATIENT
@given(ANY)
def test_the_description_of_a_key_comes_back_as_it_was_sent(http, text):
    answer = sent(http, "POST", "/v1/api-keys/", {"description": text})
    assert (answer.status_code == 200) == is_unicode(text)
    if answer.status_code == 200:
        key_id = answer.json()["id"]
        assert http.get(f"/v1/api-keys/{key_id}").json()["description"] == text
        http.delete(f"/v1/api-keys/{key_id}")


@PATIENT
@given(ANY, st.sampled_from(["python", "bash"]))
@pytest.mark.parametrize("path", ["/execute", "/execute_async"])
@pytest.mark.parametrize("field", ["command", "code"])
def test_code_runs_or_is_refused(vm, http, path, field, text, language):
    ask = {field: f"# {text}", "session_id": vm.session_id, "language": language}
    answer = sent(http, "POST", path, ask)
    assert answer.status_code in ((200,) if is_unicode(text) and "\0" not in text else (200, 422))
    assert is_unicode(text) or answer.status_code == 422


@pytest.mark.parametrize("ids", ["session_id", "snapshot_id"])
@pytest.mark.parametrize("text", ["\ud800", "\0", "\u2028"])
def test_no_id_is_anything_but_unknown(http, ids, text):
    answer = sent(http, "POST", "/v1/vms", {ids: text})
    assert answer.status_code in (404, 422)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/execute", "session_id"),
        ("/execute", "command"),
        ("/v1/vms", "metadata"),
        ("/v1/vms", "vcpu_count"),
        ("/kill", "session_id"),
        ("/download", "filename"),
        ("/v1/api-keys/", "description"),
    ],
)
@pytest.mark.parametrize("depth", [90, 200, 400, 900, 5000, 100_000])
def test_values_nested_too_deep_are_refused(http, path, name, depth):
    """Also where an API key is looked for, and where the value is repeated in the error."""
    for deep in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        body = f'{{"api_key": null, "command": "1", "{name}": {deep}}}'
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), answer.text


def test_a_filter_nested_too_deep_is_refused(http):
    for deep in (DEEP, "[" * 15_000, '{"a":' * 1500 + "1" + "}" * 1500):
        assert http.get("/v1/sessions/sandboxes", params={"metadata": deep}).status_code == 422


def deep_value(depth):
    value = {}
    for _ in range(depth):
        value = {"d": value}
    return value


@pytest.mark.parametrize("depth", [limits.JSON_DEPTH, 254, 255, 300, 900])
def test_a_result_of_the_node_is_told_whatever_it_holds(server, vm, http, monkeypatch, depth):
    """Lone surrogates, numbers that JSON does not have, values nested too deep: the code has run by then."""
    strange = {"text/html": "caf\udce9", "application/json": {"n": float("nan"), "d": deep_value(depth)}}

    async def execute(*_):
        return Outcome("ran\udc80\n", "", 0, 0.1, 0.1, outputs=(strange,))

    monkeypatch.setattr(server.node, "execute", execute)
    ask = {"command": "1", "session_id": vm.session_id}
    (output,) = sent(http, "POST", "/execute", ask).json()["outputs"]
    assert (output["text/html"], output["application/json"]["n"]) == ("caf\ufffd", None)


def test_an_output_with_line_breaks_is_one_event(server, vm, monkeypatch):
    """A guest may write its JSON as it likes; an event that it made up would be taken for ours."""
    false = '{"text/plain":\n\n"event: result"\r\n\r\n}'

    async def execute(vm_id, command, on_output=None):
        on_output("output", false.encode())
        return Outcome("", "", 0, 0.1, 0.1)

    monkeypatch.setattr(server.node, "execute", execute)
    assert [event.type for event in vm.stream("1")] == ["output", "result"]


def test_a_connection_lives_on_after_an_internal_error(server, http, monkeypatch):
    """Or the answer says that it does not."""

    async def breaks(*_):
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(server.control.tasks, "list", breaks)
    for _ in range(20):
        answer = http.get("/v1/executions")
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        assert http.get("/v1/users/me").status_code == 200

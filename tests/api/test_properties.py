"""Whatever is sent, the server answers: never a 500, always a JSON object or array, and nothing stays behind."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SIZES = {
    "vm_lifetime_seconds": st.integers(0, 90_000) | JSON,
    "vcpu_count": st.integers(-1, 10) | JSON,
    "memory_mb": st.sampled_from([256, 300, 512]) | st.integers(-1, 255) | JSON,
    "metadata": st.dictionaries(st.text(max_size=5), JSON, max_size=3) | JSON,
    "env": st.dictionaries(st.text(max_size=5), JSON, max_size=3) | JSON,
    "auto_suspend": JSON,
    "snapshot_id": JSON,
    "volumes": JSON,
}
CODE = {"command": st.just("1") | JSON, "code": JSON, "language": JSON, "timeout": st.floats(0, 700) | JSON}
PLACES = {
    ("POST", "/v1/sessions/session"): SIZES,
    ("POST", "/v1/vms"): {**SIZES, "session_id": JSON},
    ("POST", "/execute"): CODE,
    ("POST", "/execute_async"): CODE,
    ("POST", "/kill"): {},
    ("POST", "/download"): {"filename": JSON},
    ("PATCH", "/v1/vms/{vm_id}"): SIZES,
    ("POST", "/v1/vms/{vm_id}/stage-env"): {
        "entries": st.lists(st.fixed_dictionaries({"env_name": JSON, "value": JSON}), max_size=2) | JSON
    },
    ("POST", "/v1/api-keys/"): {"description": JSON},
}
IDS = st.text(max_size=30) | st.uuids().map(str)
LISTS = st.sampled_from(
    ["/v1/sessions/sandboxes", "/v1/vms", "/v1/vms/", "/v1/executions/", "/v1/api-keys/", "/v1/users/me", "/health"]
)
GENTLE = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def fits(answer):
    """Statuses of refusals that belong to what was asked; a 500 is a bug."""
    assert answer.status_code in {200, 400, 401, 403, 404, 405, 409, 410, 413, 422, 429, 501, 503}, answer.text
    if answer.status_code >= 400:
        assert answer.json()["detail"]
    return answer


@pytest.fixture
def tidy(http):
    """Sandboxes and keys that random requests made, or tried to, end with the test."""
    keys = {key["id"] for key in http.get("/v1/api-keys/").json()}
    yield
    for vm in http.get("/v1/vms").json():
        http.delete(f"/v1/vms/{vm['vm_id']}")
    for key in http.get("/v1/api-keys/").json():
        if key["id"] not in keys:
            http.delete(f"/v1/api-keys/{key['id']}")


@pytest.mark.parametrize(("method", "path"), PLACES)
def test_no_body_breaks_an_endpoint(vm, http, tidy, method, path):
    place = path.format(vm_id=vm.execute("1").vm_id)
    known = {name: st.none() | values for name, values in PLACES[method, path].items()}

    @GENTLE
    @given(
        st.fixed_dictionaries({}, optional=known), st.dictionaries(st.text(max_size=8), JSON, max_size=2), st.booleans()
    )
    def send(body, unknown, mine):
        if mine and path in ("/execute", "/execute_async", "/download"):
            body = {**body, "session_id": vm.session_id}
        unknown.pop("api_key", None)
        answer = fits(http.request(method, place, json={**unknown, **body}))
        if answer.status_code == 200 and (session_id := answer.json().get("session_id")) not in (None, vm.session_id):
            http.post("/kill", json={"session_id": session_id})

    send()
    assert vm.execute("print('alive')").stdout == "alive\n"


def is_an_ask(content):
    """Whether the bytes are a JSON object, which an endpoint whose fields are all optional rightly answers."""
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


@GENTLE
@example(content=b"{", kind="application/json")
@given(
    content=st.binary(max_size=200).filter(lambda content: not is_an_ask(content)),
    kind=st.sampled_from(["application/json", "multipart/form-data; boundary=b", "x"]),
)
@pytest.mark.parametrize("path", ["/execute", "/v1/vms", "/upload", "/download", "/kill", "/v1/api-keys/"])
def test_no_bytes_break_an_endpoint(http, path, content, kind):
    answer = fits(http.post(path, content=content, headers={"Content-Type": kind}))
    assert answer.status_code != 200


@GENTLE
@given(
    what=st.sampled_from(
        ["sessions/session", "sessions/status", "sessions/usage", "sessions/app-url", "vms", "executions", "api-keys"]
    ),
    name=IDS,
)
def test_no_id_breaks_a_lookup(http, what, name):
    answer = fits(http.get(f"/v1/{what}/{quoted(name)}"))
    assert answer.status_code in (200, 404, 422)


@GENTLE
@given(
    path=LISTS,
    query=st.dictionaries(st.sampled_from(["limit", "metadata", "port", "x"]), st.text(max_size=12), max_size=3),
)
def test_no_query_breaks_a_list(http, path, query):
    fits(http.get(path, params=query))


def quoted(text):
    from urllib.parse import quote

    return quote(text, safe="")

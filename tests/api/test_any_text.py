"""Whatever text comes over the wire, the API takes it or refuses it with the field's name: it never fails on it."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(["\ud800", "a\0b", "\u2028", "~/x"])
KIND = {"Content-Type": "application/json"}

ASKS = {
    "command": lambda session, text: ("/execute", {"command": f"# {text}", "session_id": session}),
    "session": lambda session, text: ("/execute", {"command": "1", "session_id": text}),
    "language": lambda session, text: ("/execute", {"command": "1", "session_id": session, "language": text}),
    "stream": lambda session, text: ("/execute/stream", {"command": "1", "session_id": text}),
    "download": lambda session, text: ("/download", {"filename": f"no/{text}", "session_id": session}),
    "kill": lambda session, text: ("/kill", {"session_id": text}),
    "metadata": lambda session, text: ("/v1/sessions/session", {"metadata": {"a": text}, "vcpu_count": 99}),
    "metadata name": lambda session, text: ("/v1/sessions/session", {"metadata": {text: 1}, "vcpu_count": 99}),
    "env": lambda session, text: ("/v1/sessions/session", {"env": {"A": text}, "vcpu_count": 99}),
    "env name": lambda session, text: ("/v1/sessions/session", {"env": {text: "1"}, "vcpu_count": 99}),
    "domain": lambda session, text: (f"/v1/egress/session/{session}", {"allowed_domains": [text]}),
    "cidr": lambda session, text: (f"/v1/egress/session/{session}", {"allowed_cidrs": [text]}),
    "image": lambda session, text: ("/v1/snapshots", {"oci_image": text, "vcpu_count": 99}),
    "argv": lambda session, text: (f"/v1/sessions/{session}/processes", {"command": [text], "shell": "none"}),
}


@pytest.mark.parametrize("way", ASKS)
def test_no_text_makes_a_request_fail(module_vm, server, way):
    """All are asked over one connection: one that breaks would break the next."""
    session = module_vm.session_id

    @settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=TEXT)
    def ask(text):
        path, given_ = ASKS[way](session, text)
        answer = http.post(path, content=json.dumps(given_), headers=KIND)
        assert answer.status_code < 500, answer.text
        assert answer.status_code < 400 or json.loads(answer.content)["detail"]

    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}, timeout=60) as http:
        ask()


@settings(deadline=None, max_examples=15)
@given(text=TEXT)
def test_metadata_is_kept_as_it_came_or_refused(http_module, text):
    answer = http_module.post("/v1/sessions/session", content=json.dumps({"metadata": {"a": text}}), headers=KIND)
    try:
        text.encode()
    except UnicodeEncodeError:
        assert answer.status_code == 422 and answer.json()["field"] == "metadata"
        return
    session = answer.json()["session_id"]
    try:
        assert http_module.get(f"/v1/sessions/session/{session}").json()["metadata"] == {"a": text}
    finally:
        http_module.post("/kill", json={"session_id": session})


@pytest.fixture(scope="module")
def http_module(server):
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}, timeout=60) as client:
        yield client

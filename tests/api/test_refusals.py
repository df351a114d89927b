"""What is refused, in which words, and that one account never sees another's."""

import uuid

import httpx
import pytest

from instavm import AuthenticationError, InstaVM, InvalidInput, SessionNotFound, limits

CREATE = "/v1/sessions/session"

REFUSED = [
    (CREATE, {"vcpu_count": 0}, "vcpu_count", "1 to 8"),
    (CREATE, {"vcpu_count": 9}, "vcpu_count", "1 to 8"),
    (CREATE, {"vcpu_count": 2.5}, "vcpu_count", "1 to 8"),
    (CREATE, {"vcpu_count": True}, "vcpu_count", "1 to 8"),
    (CREATE, {"vcpu_count": "2"}, "vcpu_count", "1 to 8"),
    (CREATE, {"memory_mb": 255}, "memory_mb", "256 to 8192"),
    (CREATE, {"memory_mb": 8193}, "memory_mb", "256 to 8192"),
    (CREATE, {"memory_mb": [512]}, "memory_mb", "256 to 8192"),
    (CREATE, {"vm_lifetime_seconds": 19}, "vm_lifetime_seconds", "20 to 86400"),
    (CREATE, {"vm_lifetime_seconds": 86401}, "vm_lifetime_seconds", "20 to 86400"),
    (CREATE, {"env": {"A": {"b": 1}}}, "env", "NUL"),
    (CREATE, {"env": {"A": [1]}}, "env", "NUL"),
    (CREATE, {"env": {"A": "x\0y"}}, "env", "NUL"),
    (CREATE, {"env": {"": "x"}}, "env", "names of letters"),
    (CREATE, {"env": {"A=B": "x"}}, "env", "names of letters"),
    (CREATE, {"env": {"A B": "x"}}, "env", "names of letters"),
    (CREATE, {"env": {"1A": "x"}}, "env", "names of letters"),
    (CREATE, {"env": ["A"]}, "env", "names of letters"),
    (CREATE, {"env": {f"V{n}": "" for n in range(257)}}, "env", "256"),
    (CREATE, {"env": {"A": "x" * (128 << 10)}}, "env", "131072"),
    (CREATE, {"metadata": []}, "metadata", "object"),
    (CREATE, {"metadata": {"a": "x" * (16 << 10)}}, "metadata", "16384"),
    ("/execute", {"command": ""}, "command", "not blank"),
    ("/execute", {"command": " \n\t"}, "command", "not blank"),
    ("/execute", {"command": 7}, "command", "not blank"),
    ("/execute", {"command": "x" * (limits.COMMAND_BYTES + 1)}, "command", "1048576"),
    ("/execute", {"command": "1", "language": "cobol"}, "language", "python, bash, sh"),
    ("/execute", {"command": "1", "timeout": 0}, "timeout", "1 to 600"),
    ("/execute", {"command": "1", "timeout": 601}, "timeout", "1 to 600"),
    ("/execute", {"command": "1", "timeout": "5"}, "timeout", "1 to 600"),
]


@pytest.mark.parametrize(("path", "body", "field", "allowed"), REFUSED)
def test_each_refusal_names_the_field_and_what_is_allowed(server, http, path, body, field, allowed):
    answer = http.post(path, json=body)
    told = answer.json()
    assert answer.status_code == 422
    assert (told["code"], told["field"]) == ("invalid_input", field)
    assert allowed in told["allowed"]
    assert {"loc", "msg", "type"} <= told["detail"][0].keys()
    assert not server.node.places


def test_a_refused_env_value_is_not_repeated(http):
    answer = http.post(CREATE, json={"env": {"TOKEN": ["s3cret"]}})
    assert "s3cret" not in answer.text
    assert "TOKEN" in answer.text


@pytest.mark.parametrize(
    ("path", "content", "code"),
    [
        ("/execute", b"{}", "bad_request"),
        ("/execute", b"not json", "bad_request"),
        ("/execute", b'{"command": null}', "bad_request"),
        ("/kill", b'{"session_id": "no-uuid"}', "bad_request"),
    ],
)
def test_a_request_that_cannot_be_read_is_a_bad_one(http, path, content, code):
    answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, code)


def test_a_body_that_is_too_long_is_not_read(http):
    answer = http.post("/execute", content=b"x" * (limits.BODY_BYTES + 1))
    assert (answer.status_code, answer.json()["field"]) == (413, "body")
    assert http.post("/execute", content=(b"x" * (1 << 20) for _ in range(9))).status_code == 413


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"cpu_count": 9}, "cpu_count"),
        ({"cpu_count": 0}, "cpu_count"),
        ({"memory_mb": 100}, "memory_mb"),
        ({"timeout": 5}, "timeout"),
        ({"env": {"A=B": "1"}}, "env"),
        ({"metadata": 3}, "metadata"),
        ({"max_retries": -1}, "max_retries"),
        ({"base_url": "localhost:80"}, "base_url"),
    ],
)
def test_the_sdk_refuses_before_it_sends(arguments, field):
    with pytest.raises(InvalidInput) as caught:
        InstaVM(**{"api_key": "k", "base_url": "http://127.0.0.1:9", **arguments})
    assert caught.value.field == field
    assert caught.value.allowed


def test_the_sdk_refuses_code_before_it_sends(vm):
    for arguments in ({"code": " "}, {"code": "1", "language": "cobol"}, {"code": "1", "timeout": 0}):
        with pytest.raises(InvalidInput):
            vm.execute(**arguments)


def test_no_key_or_a_wrong_one(server, monkeypatch):
    monkeypatch.delenv("INSTAVM_API_KEY", raising=False)
    for key in (None, "", "  ", "wrong", "instavm_sk_wrong", "kéy"):
        with pytest.raises(AuthenticationError):
            InstaVM(key, server.url)


def test_a_key_may_come_in_three_ways_but_only_one_key(server):
    def ask(headers, **body):
        nobody = {"command": "print(1)", "session_id": str(uuid.uuid4())}
        return httpx.post(f"{server.url}/execute", headers=headers, json=nobody | body).status_code

    assert ask({"X-API-Key": server.key}) == 404
    assert ask({"Authorization": f"Bearer {server.key}"}) == 404
    assert ask({}, api_key=server.key) == 404
    assert ask({"X-API-Key": server.key}, api_key=server.key) == 404
    assert ask({}) == 401
    assert ask({}, api_key=None) == 401
    assert ask({"X-API-Key": server.key}, api_key=server.other_key) == 401
    assert ask({"X-API-Key": server.key, "Authorization": f"Bearer {server.other_key}"}) == 401


def test_a_revoked_key_is_refused(server):
    from instavm.control.accounts import FRESH_S, Keys

    keys = Keys(server.store.accounts)
    key_id, key = server.portal.call(keys.create, "short-lived")
    accounts = server.control.accounts
    server.portal.call(keys.revoke, key_id)
    with pytest.raises(AuthenticationError):
        server.portal.call(accounts.tenant_of, key)
    assert FRESH_S <= 1


def test_another_account_sees_nothing(server, vm):
    vm.execute("1")
    session_id = vm.session_id
    with InstaVM(server.other_key, server.url, auto_start_session=False) as other:
        other.session_id = session_id
        for call in (other.get_session_info, other.get_session_status, other.get_usage, other.kill):
            with pytest.raises(SessionNotFound):
                call()
        with pytest.raises(SessionNotFound):
            other.execute("1")
        assert other.list_sandboxes() == []
        other.session_id = None
    assert vm.is_session_active()


def test_routes_that_are_not_there(http):
    answer = http.get("/v1/nothing")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert http.get("/execute").status_code == 405
    assert http.get("/v1/users/me/").status_code == 404, "no redirect: it would turn a POST into a GET"


def test_health_needs_no_key(server):
    answer = httpx.get(f"{server.url}/health").json()
    assert answer["status"] == "ok"
    assert answer["sandboxes"] is None, "how much runs here is nobody's business"


def test_an_error_that_nobody_foresaw_tells_nothing(server, http, monkeypatch):
    def broken(*_args):
        raise RuntimeError("inner secret")

    monkeypatch.setattr(server.control.sessions, "with_sandbox", broken, raising=True)
    answer = http.get("/v1/sessions/sandboxes")
    assert (answer.status_code, answer.json()) == (500, {"detail": "internal error", "code": "internal"})

"""Calls and results, without I/O."""

import json
import typing
from pathlib import PurePath

import httpx
import pytest

import instavm
from instavm.client import results
from instavm.client.calls import egress, executions, files, sessions, vms
from instavm.client.config import Config
from instavm.client.connecting import no_authorities
from instavm.client.failures import repeatable
from instavm.errors import InvalidInput, NetworkError
from instavm.wire import executions as wire_executions
from instavm.wire import sessions as wire
from instavm.wire.users import User

ANSWER = b'{"stdout": "out\\n", "stderr": "err\\n", "exit_code": 3, "execution_time": 0.5, "cpu_time": 0.25}'


def config(**more):
    given = {"cpu_count": None, "memory_mb": None, "env": None, "metadata": None}
    return Config.of("key", "http://x", 300, 0, **{**given, **more})


def test_only_what_was_given_is_sent():
    body = json.loads(sessions.create("key", config().session).body)
    assert body == {"api_key": "key", "vm_lifetime_seconds": 300}
    body = json.loads(sessions.create("key", config(cpu_count=4, memory_mb=4096, env={"A": 1}).session).body)
    assert body == {
        "api_key": "key",
        "vm_lifetime_seconds": 300,
        "vcpu_count": 4,
        "memory_mb": 4096,
        "env": {"A": "1"},
    }
    body = json.loads(executions.execute("id", "1", "python", None).body)
    assert body == {"command": "1", "session_id": "id", "language": "python"}


def test_the_client_waits_longer_than_the_code_may_take():
    assert executions.execute("id", "1", "python", 600).answer_s > 600
    assert executions.execute("id", "1", "python", None).answer_s > 300


def test_a_result_is_a_dictionary_with_attributes():
    result = executions.execute("id", "1", "python", None).read(ANSWER)
    assert result["stdout"] == result.stdout == result.get("stdout") == "out\n"
    assert "stderr" in result
    assert list(result)[:3] == ["stdout", "stderr", "exit_code"]
    assert result.get("nothing") is None
    assert str(result) == "out\nerr\n"
    assert json.loads(json.dumps(result))["exit_code"] == 3
    assert repr(result).startswith("Execution(exit_code=3, stdout='out\\n', stderr='err\\n'")
    with pytest.raises(AttributeError, match="stdout"):
        _ = result.output


def test_a_long_output_makes_a_short_repr():
    long = ANSWER.replace(b"out\\n", b"x" * 10_000)
    assert len(repr(executions.execute("id", "1", "python", None).read(long))) < 300


@pytest.mark.parametrize(
    ("result", "model"),
    [
        (results.Execution, wire_executions.Execution),
        (results.SessionInfo, wire.Session),
        (results.SessionStatus, wire.SessionStatus),
        (results.SessionUsage, wire.SessionUsage),
        (results.Sandbox, wire.Sandbox),
        (results.Start, wire.Start),
        (results.User, User),
    ],
)
def test_results_have_the_attributes_that_the_wire_has(result, model):
    assert typing.get_type_hints(result).keys() == model.model_fields.keys()


def test_an_answer_of_something_else_is_said_to_be_one():
    with pytest.raises(NetworkError, match="base_url"):
        executions.execute("id", "1", "python", None).read(b"<html>")
    with pytest.raises(NetworkError):
        sessions.sandboxes(None, 5).read(b"{}")


def test_ids_cannot_leave_their_place_in_the_path():
    assert sessions.info("../../kill?x#y").path == "/v1/sessions/session/..%2F..%2Fkill%3Fx%23y"


@pytest.mark.parametrize("limit", [0, 1001, True, "5"])
def test_a_limit_out_of_range_is_refused(limit):
    with pytest.raises(InvalidInput, match="1 to 1000"):
        sessions.sandboxes(None, limit)


@pytest.mark.parametrize("url", ["ftp://x", "x:8000", "http://", "http://[::1", "http://x:port", "http://x:99999"])
def test_an_address_that_is_none_is_refused_by_name(url):
    with pytest.raises(InvalidInput, match="base_url"):
        Config.of("key", url, 300, 0, cpu_count=None, memory_mb=None, env=None, metadata=None)


def test_code_that_was_sent_is_never_sent_again():
    run = executions.execute("id", "1", "python", None)
    look = sessions.info("id")
    assert repeatable(httpx.ConnectError("refused"), run)
    assert not repeatable(httpx.ReadError("reset"), run)
    assert not repeatable(httpx.ReadTimeout("slow"), run)
    assert repeatable(httpx.ReadError("reset"), look)


def test_secrets_are_in_no_repr():
    assert "s3cret" not in repr(config(env={"A": "s3cret"}))
    assert "key" not in repr(sessions.create("key", config().session)).replace("api_key", "")
    assert "'key'" not in repr(config())


def test_plain_http_trusts_no_certificate_rather_than_every_one():
    assert no_authorities().verify_mode.name == "CERT_REQUIRED"
    assert no_authorities().cert_store_stats()["x509_ca"] == 0


def test_every_public_name_can_be_loaded():
    for name in instavm.__all__:
        assert getattr(instavm, name).__name__ == name
    assert set(instavm.__all__) <= set(dir(instavm))
    with pytest.raises(AttributeError):
        _ = instavm.NoSuchName


def test_both_clients_have_the_same_methods():
    def public(kind):
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(instavm.InstaVM) == public(instavm.AsyncInstaVM)


@pytest.mark.parametrize("wrong", ["allow_domains", "allowed_domain", "deny"])
def test_a_misspelt_restriction_is_refused_and_opens_nothing(wrong):
    with pytest.raises(InvalidInput, match=f"{wrong}.*allowed_domains"):
        egress.put("session", "s", {wrong: ["example.com"]})
    with pytest.raises(InvalidInput, match=wrong):
        egress.check("session", "s", "example.com", 443, "tcp", {wrong: ["example.com"]})


def test_a_misspelt_argument_of_a_new_vm_is_refused():
    with pytest.raises(InvalidInput, match=r"memory: 512.*memory_mb"):
        vms.create(memory=512)


def test_a_folder_is_no_upload_under_the_name_of_an_argument_that_nobody_gave():
    with pytest.raises(InvalidInput, match="file_path"):
        files.upload("s", PurePath("."), "/app/")
    files.upload("s", PurePath("."), "/app/x")  # opening it tells what it is

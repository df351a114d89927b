"""What confines a sandbox, asked over the API; and sandboxes that are not started on less than was asked for."""

import json
from collections import OrderedDict

import pytest

from instavm import InstaVM, InvalidInput, IsolationTooWeak, NotFound, SignatureError
from instavm.cli.app import run
from instavm.client.isolation import verify
from instavm.node.isolation import Signer


def test_it_is_asked_for_by_the_id_of_the_vm(vm):
    vm.execute("1")
    told = vm.get_isolation()
    assert told.report["vm_id"] == vm.get_session_info()["vm_id"]
    assert (told["algorithm"], told["report"]["tier"]) == ("ed25519", "emulated")


def test_one_of_somebody_else_looks_like_none(server, vm):
    vm.execute("1")
    vm_id = vm.get_session_info()["vm_id"]
    with InstaVM(server.other_key, server.url, auto_start_session=False) as other:
        with pytest.raises(NotFound):
            other.get_isolation(vm_id)
        with pytest.raises(NotFound):
            other.get_isolation("vm-0000000000")


def test_a_host_that_has_less_starts_nothing(server):
    started = list(server.node.started)
    with pytest.raises(IsolationTooWeak, match="kvm asked for"):
        InstaVM(server.key, server.url, require_isolation="kvm")
    assert server.node.started == started
    with InstaVM(server.key, server.url, require_isolation="emulated") as vm:
        assert vm.execute("print(1)").stdout == "1\n"


def test_over_http_too_and_a_word_that_is_no_tier_is_refused(http):
    refused = http.post("/v1/vms", json={"require_isolation": "kvm"})
    assert (refused.status_code, refused.json()["code"]) == (503, "isolation_too_weak")
    refused = http.post("/v1/vms", json={"require_isolation": "container"})
    assert (refused.status_code, refused.json()["field"]) == (422, "require_isolation")
    with pytest.raises(InvalidInput, match="kvm or emulated"):
        InstaVM("key", require_isolation="container")


@pytest.fixture
def signed(tmp_path):
    signer = Signer(tmp_path)
    told = signer.sign({"vm_id": "vm-1", "tier": "kvm", "at": "now", "weaker": [], "uid": [7, 8]})
    return signer, {"report": told.report, "signature": told.signature, "public_key": told.public_key}


def test_the_hosts_key_is_made_once_and_is_nobody_elses_to_read(tmp_path, signed):
    assert Signer(tmp_path).public_key == signed[0].public_key
    assert (tmp_path / "isolation.key").stat().st_mode & 0o777 == 0o600


def test_a_report_is_checked_without_any_server(signed):
    signer, document = signed
    again = json.loads(json.dumps(document, indent=3))
    shuffled = {**again, "report": OrderedDict(reversed(again["report"].items()))}
    assert verify(shuffled, signer.public_key)["tier"] == "kvm"


def test_what_was_altered_or_signed_by_another_host_is_refused(signed, tmp_path):
    signer, document = signed
    (tmp_path / "other").mkdir()
    other = Signer(tmp_path / "other").public_key
    for wrong, key in (
        ({**document, "report": {**document["report"], "uid": [0]}}, signer.public_key),
        ({**document, "signature": "AAAA"}, signer.public_key),
        ({**document, "signature": "?"}, signer.public_key),
        ({}, signer.public_key),
        (document, other),
        (document, "no key"),
    ):
        with pytest.raises(SignatureError):
            verify(wrong, key)


def test_the_command_line_checks_a_file(signed, tmp_path, capsys):
    signer, document = signed
    file, key = tmp_path / "report.json", tmp_path / "host.pub"
    file.write_text(json.dumps(document))
    key.write_text(signer.public_key)
    assert run(["isolation", "verify", str(file), "--key", str(key)]) == 0
    assert "signed by this host: vm-1 at now, tier kvm" in capsys.readouterr().out
    file.write_text(json.dumps({**document, "report": {}}))
    assert run(["isolation", "verify", str(file), "--key", str(key)]) == 1
    assert "altered" in capsys.readouterr().err


def test_the_command_line_shows_a_report(server, vm, capsys):
    vm.execute("1")
    vm_id = vm.get_session_info()["vm_id"]
    assert run(["isolation", vm_id, "--api-key", server.key, "--base-url", server.url]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["vm_id"] == vm_id

"""Numbers of the node for a monitoring system, and for nobody but the server's own account."""

from prometheus_client.parser import text_string_to_metric_families


def samples(text):
    return {
        (one.name, *one.labels.values()): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_the_servers_own_account_reads_them(server, http):
    before = len(server.node.places)
    with server.client():
        answer = http.get("/metrics")
        found = samples(answer.text)
        assert answer.headers["content-type"].startswith("text/plain")
        assert found["instavm_node", "local", "emulated", "1"] == 1
        assert found["instavm_machines_waiting", "warm_machine"] == 0
        assert found["instavm_failed_starts_total",] == 0
        assert found["instavm_sandboxes",] in (before, before + 1)  # the sandbox may still be starting


def test_another_account_and_nobody_are_refused(server, http):
    assert http.get("/metrics", headers={"X-API-Key": server.other_key}).status_code == 403
    assert http.get("/metrics", headers={"X-API-Key": "wrong"}).status_code == 401

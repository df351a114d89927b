"""The published description of the API is the one that the server has: a change of the contract is a change of this file."""

import json
from pathlib import Path

import httpx
import pytest

from instavm.control.openapi import description

KEPT = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_kept_description_is_current():
    """`python -m instavm.control.openapi > docs/openapi.json` makes it anew; look at what changed before it is kept."""
    assert json.loads(KEPT.read_text()) == description()


def test_it_is_served_with_a_page_to_read_it(http):
    assert http.get("/openapi.json").json() == description()
    assert "swagger" in http.get("/docs").text.lower()


OPERATIONS = {
    f"{method} {path}": operation
    for path, methods in description()["paths"].items()
    for method, operation in methods.items()
}


def test_every_error_is_a_problem():
    """FastAPI's own model of a refused value is what this server never sends."""
    assert "HTTPValidationError" not in json.dumps(description())
    problem = {"$ref": "#/components/schemas/Problem"}
    for name, operation in OPERATIONS.items():
        errors = {status: told for status, told in operation["responses"].items() if not status.startswith("2")}
        assert {"500"} <= errors.keys(), name
        assert all(told["content"]["application/json"]["schema"] == problem for told in errors.values()), name


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_described(name):
    operation = OPERATIONS[name]
    assert operation["operationId"] and operation["description"]
    (tag,) = operation["tags"]
    assert tag in {one["name"] for one in description()["tags"]}


def test_no_two_operations_have_one_id():
    assert len({operation["operationId"] for operation in OPERATIONS.values()}) == len(OPERATIONS)


def test_every_operation_but_health_needs_a_key(server):
    document = description()
    assert document["security"] == [{"ApiKey": []}, {"Bearer": []}]
    for name, operation in OPERATIONS.items():
        method, path = name.split()
        answer = httpx.request(method, server.url + path.replace("{key_id}", "1"), json={"command": "1"})
        assert (answer.status_code == 200) == (operation.get("security") == []) == (path == "/health"), name


def test_no_secret_has_an_example_or_a_default():
    assert "instavm_sk_" not in json.dumps(description())

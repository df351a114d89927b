"""The published description of the API is the one that the server has: a change of the contract is a change of this file."""

import json
from pathlib import Path

from instavm.control.openapi import description

KEPT = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_kept_description_is_current():
    """`python -m instavm.control.openapi > docs/openapi.json` makes it anew; look at what changed before it is kept."""
    assert json.loads(KEPT.read_text()) == description()


def test_it_is_served_with_a_page_to_read_it(http):
    assert http.get("/openapi.json").json() == description()
    assert "swagger" in http.get("/docs").text.lower()


def test_no_secret_has_an_example_or_a_default():
    assert "instavm_sk_" not in json.dumps(description())

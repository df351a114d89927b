"""Settings that are wrong are refused by name; the page of all of them is current."""

from pathlib import Path

import pytest

from instavm import settings_page
from instavm.errors import HostNotReady, InvalidInput
from instavm.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_current():
    """`python -m instavm.settings_page > docs/settings.md` makes it anew."""
    assert PAGE.read_text() == settings_page.page()


def test_every_setting_says_what_it_means():
    rows = [line.split(" | ") for line in settings_page.page().splitlines() if line.startswith("| `INSTAVM_")]
    assert len(rows) == len(Settings.model_fields) + 2
    assert [row[0] for row in rows if len(row[-1]) < 20] == []


def test_a_misspelt_variable_is_refused_with_the_nearest_name(monkeypatch):
    monkeypatch.setenv("INSTAVM_SPARE_MACHINE", "3")
    with pytest.raises(HostNotReady, match=r"INSTAVM_SPARE_MACHINE: .* did you mean INSTAVM_SPARE_MACHINES\?"):
        Settings()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("INSTAVM_DRIVER", "foo", "'auto', 'qemu' or 'firecracker'"),
        ("INSTAVM_SPARE_MACHINES", "-1", "greater than or equal to 0"),
        ("INSTAVM_DISK_GIB", "much", "valid integer"),
        ("INSTAVM_EGRESS_DNS", "10.0.0.1", "list in JSON"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(monkeypatch, name, value, allowed):
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=allowed) as caught:
        Settings()
    assert caught.value.field == name and value in str(caught.value)


def test_a_password_is_not_shown(monkeypatch):
    monkeypatch.setenv("INSTAVM_EGRESS_PROXY", "ftp://user:sesame@proxy")
    with pytest.raises(InvalidInput) as caught:
        Settings()
    assert "sesame" not in str(caught.value)

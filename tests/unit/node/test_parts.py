"""How old what confines a sandbox is, and what is known of it."""

import json
import struct
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from importlib import resources

import pytest

from instavm.contract.isolation import Tier
from instavm.node import parts
from instavm.node.parts import Part

KERNEL = "6.1.0-57-cloud-amd64 (maintainers@kernel.example) #1 SMP PREEMPT_DYNAMIC Debian 6.1.192-3 (2026-11-26)"


@pytest.fixture
def bzimage(tmp_path):
    def make(told):
        header = bytearray(0x8000)
        header[0x202:0x206] = b"HdrS"
        header[0x20E:0x210] = struct.pack("<H", 0x3000)
        header[0x3200 : 0x3200 + len(told)] = told.encode()
        (tmp_path / "bzImage").write_bytes(header)
        return tmp_path / "bzImage"

    return make


def test_a_guests_kernel_says_which_it_is_and_when_it_was_built(bzimage):
    (kernel,) = parts._guest_kernel(bzimage(KERNEL))
    assert kernel.version == "6.1.0-57-cloud-amd64 (6.1.192)"
    assert (kernel.built, kernel.compared) == (date(2026, 11, 26), "6.1.192")


def test_what_is_no_kernel_tells_nothing(tmp_path):
    (tmp_path / "bzImage").write_bytes(bytes(0x8000))
    assert parts._guest_kernel(tmp_path / "bzImage") == []
    assert parts._guest_kernel(tmp_path / "gone") == []


@pytest.mark.parametrize(
    ("release", "told", "compared", "built"),
    [
        ("6.18.44", "6.18.44 #1 SMP @0", "6.18.44", None),
        ("5.15.0-91-generic", "#101-Ubuntu SMP Tue Nov 14 13:30:08 UTC 2023", None, date(2023, 11, 14)),
        ("5.14.0-427.el9.x86_64", "#1 SMP", None, None),
        ("6.1.0-57-cloud-amd64", KERNEL, "6.1.192", date(2026, 11, 26)),
    ],
)
def test_a_distributions_kernel_is_not_judged_by_a_number_that_does_not_change(release, told, compared, built):
    kernel = parts._kernel("host kernel", release, told)
    assert (kernel.compared, kernel.built) == (compared, built)


@pytest.mark.parametrize(
    ("component", "version", "ids"),
    [
        ("firecracker", "1.12.1", ["CVE-2026-1386"]),
        ("firecracker", "1.14.4", []),
        ("qemu", "7.2.10", ["CVE-2024-3446"]),
        ("qemu", "7.2.22", []),
        ("qemu", "8.2.2", ["CVE-2024-3446"]),
        ("qemu", "10.0.2", []),
    ],
)
def test_a_vmm_is_known_by_its_version(component, version, ids):
    assert [fault.id for fault in parts.faults_of(component, version)] == ids


def test_a_kernel_is_known_by_its_version_on_the_tier_that_it_matters_to():
    kernel = Part("host kernel", "linux", "6.18.20", compared="6.18.20")
    assert [fault.id for fault in parts.judged(kernel, Tier.KVM).faults] == ["CVE-2026-23401"]
    assert parts.judged(kernel, Tier.EMULATED).faults == ()
    assert parts.judged(replace(kernel, name="guest kernel"), Tier.KVM).faults == ()


def test_a_kernel_is_known_by_the_day_before_the_fix():
    old = Part("guest kernel", "linux", "6.1.0", built=date(2026, 3, 31))
    assert [fault.id for fault in parts.judged(old, Tier.EMULATED).faults] == ["CVE-2026-31431"]
    assert parts.judged(replace(old, built=date(2026, 4, 1)), Tier.EMULATED).faults == ()
    assert (
        "guest kernel: linux 6.1.0 has a known fault, CVE-2026-31431" in parts.worse([parts.judged(old, Tier.KVM)])[0]
    )


def test_an_age_is_told_where_a_day_is_known():
    part = Part("VMM", "qemu", "7.2.22", built=datetime.now(UTC).date() - timedelta(days=40))
    assert part.told()["age_days"] == 40 and "40 days old" in part.words()
    unknown = replace(part, built=None)
    assert unknown.told()["built"] is None and "unknown day" in unknown.words()


def test_the_list_that_is_shipped_can_be_read_and_every_entry_is_whole():
    known = json.loads((resources.files("instavm.node") / "known_bad.json").read_text())
    assert date.fromisoformat(known["as_of"]) <= datetime.now(UTC).date()
    for entry in known["entries"]:
        assert date.fromisoformat(entry["date"]) <= date.fromisoformat(known["as_of"])
        assert entry["id"] and entry["sentence"] and (entry["ranges"] or entry["built_before"])
        for first, fixed in entry["ranges"]:
            assert parts._numbers(first) < parts._numbers(fixed)

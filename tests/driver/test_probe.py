"""A `/dev/kvm` that opens and boots nothing, as some hosts have: found out with a real guest, and named to whoever looks."""

import pytest

from instavm.contract.isolation import Tier
from instavm.node import doctor
from instavm.node.jail.jail import Jails
from instavm.node.vmm import choose

pytestmark = pytest.mark.anyio


async def test_a_kvm_device_that_boots_nothing_is_named_by_the_choice_and_by_the_doctor(settings, guest, tmp_path):
    if (closed := choose.closed()) is not None:
        pytest.skip(closed)
    here = {"driver": "qemu", "acceleration": "auto", "state_dir": tmp_path, "probe_timeout_s": 3.0}
    own = settings.model_copy(update=here)
    with Jails.open(own) as jails:
        driver, words = await choose.choose(own, jails)
    if driver.tier is Tier.KVM:
        pytest.skip("hardware virtualisation works here")
    assert driver.tier is Tier.EMULATED
    assert words.startswith(f"{choose.KVM_DEVICE} opens, but ") and "qemu-kvm" in words
    told = {check.name: check for check in doctor.checks(own)}
    assert told["qemu-kvm"].ok and told["qemu-kvm"].detail.startswith(words)

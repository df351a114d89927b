"""The driver seam on every driver that this host can run."""

import os
import shutil
from pathlib import Path

import pytest

from instavm.node.images.store import ImageStore
from instavm.node.jail.jail import Jails
from instavm.node.layers import overlay
from instavm.node.machines import make_home
from instavm.node.templates import Templates
from instavm.node.vmm import firecracker, qemu
from instavm.node.vmm.firecracker import FirecrackerDriver
from instavm.node.vmm.qemu import QemuDriver


@pytest.fixture(scope="session")
def furnish(template):
    """Puts an empty disk into a machine's folder."""

    def put(home):
        shutil.copyfile(template.blank, home / "disk.qcow2")
        (home / "disk.qcow2").chmod(0o600)

    return put


@pytest.fixture(scope="session")
def images(settings):
    return ImageStore(settings.cache_dir, settings.disk_gib)


@pytest.fixture(scope="session")
def guest(images):
    return images.ensure_guest()


@pytest.fixture(scope="session")
def image(images):
    return images.ensure_default()


@pytest.fixture(scope="session", params=os.environ.get("INSTAVM_TEST_DRIVERS", "tcg").split(","))
async def driver(request, settings, anyio_backend):
    """`tcg`, and where KVM works `kvm` and `firecracker`: in the rig of tests/kvm, which names them in the environment."""
    settings.state_dir.mkdir(mode=0o700, exist_ok=True)
    with Jails.open(settings) as jails:
        driver = (
            FirecrackerDriver(settings, jails) if request.param == "firecracker" else QemuDriver(request.param, jails)
        )
        await driver.version()
        yield driver
        driver.close()


@pytest.fixture
def missing(driver, monkeypatch):
    """The VMM is not on this host. How it is to be had."""
    if isinstance(driver, FirecrackerDriver):
        monkeypatch.setattr(driver, "_settings", driver._settings.model_copy(update={"firecracker": Path("/none")}))
        return firecracker.HOW_TO_GET
    monkeypatch.setattr(qemu, "BINARY", "qemu-system-none")
    return qemu.HOW_TO_GET


@pytest.fixture(scope="session")
async def template(settings, driver, guest, image):
    templates = Templates(settings, driver, guest)
    template, _ = await templates.get(image, 2, 512)
    return template


@pytest.fixture
def homes(short_folder, template, furnish):
    """Folders for machines: the first on an empty overlay, the others on what they are told."""
    made = []

    def make(backing=None):
        home = short_folder / f"home-{len(made)}"
        make_home(
            home,
            template,
            furnish if backing is None else lambda home: overlay(template.blank, backing, home / "disk.qcow2"),
        )
        made.append(home)
        return home

    yield make
    for home in made:
        shutil.rmtree(home)

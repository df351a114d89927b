"""The driver seam on every driver that this host can run."""

import shutil

import pytest

from instavm.node.images.store import ImageStore
from instavm.node.jail.jail import Jails
from instavm.node.templates import Templates
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


@pytest.fixture(scope="session", params=["tcg"])
async def driver(request, settings, anyio_backend):
    """KVM joins the list where it works; the machines that this is developed on have none that does."""
    settings.state_dir.mkdir(mode=0o700, exist_ok=True)
    with Jails.open(settings) as jails:
        driver = QemuDriver(request.param, jails)
        await driver.version()
        yield driver
        driver.close()


@pytest.fixture(scope="session")
async def template(settings, driver, guest, image):
    templates = Templates(settings, driver, guest)
    template, _ = await templates.get(image, 2, 512)
    return template

"""Which registries package managers are set up for: what we find out is what they themselves say, in the default image."""

import os
import subprocess

import pytest

from instavm.node import npmrc, registries
from instavm.node.images.store import ImageStore
from instavm.settings import Settings

REAL_PIP = """python3 - <<'END'
from pip._internal.commands import create_command
from pip._internal.models.index import PyPI
options, _ = create_command("install").parse_args([])
print(options.index_url, *options.extra_index_urls, *options.find_links, sep="\\n")
if options.index_url.rstrip("/") == PyPI.simple_url.rstrip("/"):
    print("https://" + PyPI.file_storage_domain)
END"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The default image's tree, to be written to; nothing of it stays."""
    settings = Settings()
    rootfs = ImageStore(settings.cache_dir, settings.disk_gib).find("default").rootfs
    place = tmp_path_factory.mktemp("image")
    for name in ("below", "own", "tree"):
        (place / name).mkdir()
    mounted = []

    def mount(*how):
        subprocess.run(["mount", *how], check=True)
        mounted.append(how[-1])

    try:
        mount("-o", "loop,ro,noload", rootfs, place / "below")
        mount("-t", "tmpfs", "tmpfs", place / "own")
        for name in ("upper", "work"):
            (place / "own" / name).mkdir()
        layers = f"lowerdir={place}/below,upperdir={place}/own/upper,workdir={place}/own/work"
        mount("-t", "overlay", "-o", layers, "overlay", place / "tree")
        yield place / "tree"
    finally:
        for target in reversed(mounted):
            subprocess.run(["umount", target], check=True)


@pytest.fixture
def run(image):
    """Set files and variables up; gives what runs shell code there, and removes the files again."""
    before = {}

    def set_up(files, env):
        for name, text in files.items():
            path = image / name
            path.parent.mkdir(parents=True, exist_ok=True)
            before[path] = path.read_text() if path.exists() else None
            path.write_text(text)

        async def run(code):
            every = {"PATH": os.defpath + ":/usr/bin:/bin", "HOME": "/root", **env}
            shell = ["/usr/sbin/chroot", image, "sh", "-c", "cd /app; " + code]
            done = subprocess.run(shell, env=every, capture_output=True, text=True)
            return done.stdout if done.returncode == 0 else ""

        return run

    yield set_up
    for path, text in before.items():
        path.unlink() if text is None else path.write_text(text)


NPM = {
    "as it comes": ({}, {}),
    "the user's": (
        {"root/.npmrc": "; a note\nregistry = https://user.test/npm/ ; why\n@one:registry='https://one.test'\n"},
        {},
    ),
    "each level": (
        {
            "etc/npmrc": "registry=https://system.test\n@one:registry=https://system-one.test\n@two:registry=https://two.test\n",
            "root/.npmrc": "registry=https://user.test\n@one:registry=https://${WHO}.test\n[section]\nregistry=https://no.test\n",
            "app/.npmrc": "registry=https://project.test\n",
        },
        {"npm_config_WHO": "x", "WHO": "someone"},
    ),
    "the environment": (
        {"root/.npmrc": "registry=https://user.test\n"},
        {"NPM_CONFIG_REGISTRY": "https://variable.test"},
    ),
    "files elsewhere": (
        {"opt/user": "globalconfig=/opt/system\n", "opt/system": "registry=https://elsewhere.test\n"},
        {"npm_config_userconfig": "/opt/user"},
    ),
    "no URL": ({"etc/npmrc": "registry=https://system.test\n", "root/.npmrc": "registry=nonsense\n"}, {}),
}


def expanded(urls):
    return {url.rstrip("/") for url in urls}


@pytest.mark.anyio
@pytest.mark.parametrize("case", NPM)
async def test_npms_files_say_what_npm_says(run, case):
    files, env = NPM[case]
    ask, slowly = run(files, env), []

    async def watched(code):
        slowly.append(code == npmrc.ASK_NPM)
        return await ask(code)

    assert expanded(await npmrc.registries(watched)) == expanded(npmrc._of_npm(await ask(npmrc.ASK_NPM)))
    assert not any(slowly), "npm was started for it"


PIP = {
    "as it comes": ({}, {}),
    "each level": (
        {
            "etc/pip.conf": "[global]\nindex_url = https://system.test/simple\nextra-index-url = https://more.test\n",
            "root/.config/pip/pip.conf": "[install]\nindex-url = https://user.test/simple\n",
        },
        {},
    ),
    "the environment": (
        {"root/.pip/pip.conf": "[global]\nindex-url = https://user.test\nfind-links = https://links.test\n"},
        {"PIP_INDEX_URL": "https://variable.test/simple", "PIP_EXTRA_INDEX_URL": "https://a.test https://b.test"},
    ),
    "a file of one's own": (
        {"opt/pip.conf": "[global]\nextra-index-url =\n    https://a.test\n    https://b.test\n"},
        {"PIP_CONFIG_FILE": "/opt/pip.conf"},
    ),
    "no files at all": (
        {"root/.pip/pip.conf": "[global]\nindex-url = https://user.test\n"},
        {"PIP_CONFIG_FILE": os.devnull},
    ),
}


@pytest.mark.anyio
@pytest.mark.parametrize("case", PIP)
async def test_pips_files_say_what_pip_says(run, case):
    ask = run(*PIP[case])
    said = (await ask(registries.PIP)).split()
    assert said and said == (await ask(REAL_PIP)).split()


@pytest.mark.anyio
async def test_apts_sources(run):
    ask = run({"etc/apt/sources.list.d/own.list": "deb [trusted=yes] http://own.test:8080/debian stable main\n"}, {})
    hosts = {one.host: one.ports for one in registries.found((await ask(registries.APT)).splitlines())}
    assert hosts["own.test"] == (80, 443, 8080) and len(hosts) > 1


@pytest.mark.anyio
async def test_an_image_without_them_has_none():
    async def fails(code):
        return ""

    assert await npmrc.registries(fails) == []


def test_an_npmrc_is_read_as_npm_reads_it():
    text = '# x\n;y\n "a" = b # c\nd\\;e=f\\#g\n h="i;j"\nk=${V}${W}${X?}\\${V}\nl\n[m]\nn=o\n'
    assert dict(npmrc._ini(text, {"V": "v"})) == {
        "a": "b",
        "d;e": "f#g",
        "h": "i;j",
        "k": "v${W}${V}",
    }

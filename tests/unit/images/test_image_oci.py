"""Images of strangers: what is resolved, what their layers become, and what is refused before anything is unpacked."""

import hashlib
import io
import subprocess
import tarfile

import oci_made
import pytest
from oci_made import entry, folder, layer, layout

from instavm.contract.snapshots import Pull
from instavm.errors import SnapshotError
from instavm.node.images import oci
from instavm.node.images.plain import make_plain

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def work(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    return work


def image(reference, work, **more):
    return oci.Image(Pull(reference, **more), work, lambda line: None)


async def files_of(reference, work, **more):
    """What came to lie on the disk: `debugfs` reads it as the guest's kernel would."""
    disk = work / "disk.raw"
    one = image(reference, work, **more)
    await one.resolve()
    await one.write(disk)
    return lambda *command: (
        subprocess.run(["debugfs", "-R", " ".join(command), disk], capture_output=True, text=True).stdout
    )


async def test_layers_become_one_tree(tmp_path, work):
    reference = layout(
        tmp_path / "layout",
        layer(
            folder("d"),
            entry("d/gone", b"x"),
            entry("d/kept", b"below", uid=1000, gid=1001, mode=0o4755),
            folder("opaque"),
            entry("opaque/old", b"x"),
            entry("file", b"one", xattrs={"user.note": "hello"}),
            entry("hard", hard="file"),
            entry("soft", link="/etc/passwd"),
        ),
        layer(entry("d/.wh.gone"), entry("opaque/.wh..wh..opq"), entry("opaque/new", b"y"), entry("d/added", b"z")),
    )
    debugfs = await files_of(reference, work)
    assert [name in debugfs("ls", "/d") for name in ("gone", "kept", "added", ".wh.")] == [False, True, True, False]
    assert [name in debugfs("ls", "/opaque") for name in ("old", "new", ".wh.")] == [False, True, False]
    kept = debugfs("stat", "/d/kept")
    assert "User:  1000" in kept and "Group:  1001" in kept and "Mode:  04755" in kept
    assert debugfs("cat", "/hard") == "one" and "Links: 2" in debugfs("stat", "/file")
    assert "user.note" in debugfs("ea_list", "/file")
    assert "/etc/passwd" in debugfs("stat", "/soft")


async def test_layers_of_zstd(tmp_path, work):
    layers = (layer(entry("file", b"below"), entry("gone", b"x")), layer(entry("file", b"above"), entry(".wh.gone")))
    debugfs = await files_of(layout(tmp_path / "layout", *layers, packed="zstd"), work)
    assert debugfs("cat", "/file") == "above" and "gone" not in debugfs("ls", "/")


async def test_a_bomb_of_zstd_is_ended_while_it_is_unpacked(tmp_path, work):
    reference = layout(tmp_path / "layout", layer(entry("zeros", bytes(1 << 20))), packed="zstd")
    one = image(reference, work)
    await one.resolve()
    for most, words in ((100_000, "more than its disk"), (4 << 20, None)):
        place = work / f"{most}"
        await one._skopeo("copy", "--quiet", reference, f"oci:{place}:image")
        if words is None:
            assert await make_plain(place, most, ()) and not await make_plain(place, most, ())
            continue
        with pytest.raises(SnapshotError, match=words):
            await make_plain(place, most, ())


async def test_what_is_resolved(tmp_path, work):
    place = tmp_path / "layout"
    reference = layout(place, layer(folder("d")), env=["A=b", "C=d=e"], labels={"by": "me"}, other="arm64")
    found = await image(reference, work, env={"A": "mine"}).resolve()
    assert (found.env, found.labels) == ({"A": "mine", "C": "d=e"}, {"by": "me"})
    assert found.digest.startswith("sha256:") and len(found.digest) == 71


async def test_the_platform_is_picked_from_an_index(tmp_path, work):
    reference = layout(tmp_path / "layout", layer(folder("right")), other="arm64")
    debugfs = await files_of(reference, work)
    assert "right" in debugfs("ls", "/") and "wrong" not in debugfs("ls", "/")


async def test_an_image_for_another_machine_is_refused(tmp_path, work):
    reference = layout(tmp_path / "layout", layer(folder("d")), architecture="arm64")
    with pytest.raises(SnapshotError, match="linux/arm64; sandboxes are linux/amd64"):
        await image(reference, work).resolve()


async def test_an_archive_of_docker_save(tmp_path, work):
    reference = layout(tmp_path / "layout", layer(entry("file", b"saved")), env=["A=b"])
    archive = tmp_path / "saved.tar"
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", reference, f"docker-archive:{archive}:some/name:tag"]
    subprocess.run(copy, check=True)
    debugfs = await files_of(f"docker-archive:{archive}", work)
    assert debugfs("cat", "/file") == "saved"


HOSTILE = {
    "leads out": [entry("../../etc/cron.d/x", b"* * * * * root true")],
    "leads out through dots": [folder("a"), entry("a/../../x", b"x")],
    "a hard link out": [entry("link", hard="../../../etc/shadow")],
    "a whiteout of what is above": [folder("a"), entry("a/.wh...")],
    "a whiteout of the root": [entry(".wh..")],
    "a whiteout of nothing": [entry("a/.wh.")],
    "a device": [entry("disk", kind=tarfile.BLKTYPE)],
    "a root that is a link": [entry(".", link="/")],
    "a root that is a link, spelt otherwise": [entry("./", link="/etc")],
    "a character device": [entry("etc/mem", kind=tarfile.CHRTYPE)],
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_layers_are_refused_before_they_are_unpacked(tmp_path, work, name):
    """S12, for images."""
    reference = layout(tmp_path / "layout", layer(entry("fine", b"x"), *HOSTILE[name]))
    one = image(reference, work)
    await one.resolve()
    with pytest.raises(SnapshotError, match=r"leads out of it|removes what|a device that|root is something else"):
        await one.write(work / "disk.raw")
    assert not (work / "tree").exists() and not (work / "disk.raw").exists()


async def test_a_link_to_a_folder_of_the_host_is_not_followed(tmp_path, work):
    victim = tmp_path / "victim"
    victim.mkdir()
    reference = layout(
        tmp_path / "layout", layer(entry("way", link=str(victim))), layer(entry("way/in", b"written through the link"))
    )
    await files_of(reference, work)
    assert list(victim.iterdir()) == []


async def test_a_bomb_is_refused_while_it_is_read(tmp_path, work):
    class Zeros(io.RawIOBase):
        def read(self, size=-1):
            return bytes(size)

    body = io.BytesIO()
    info = entry("zeros")[0]
    info.size = 3 << 30
    body.write(info.tobuf(tarfile.PAX_FORMAT))
    body.write(bytes(64 << 20))  # the archive says 3 GB: that is enough to refuse it
    reference = layout(tmp_path / "layout", body.getvalue())
    one = image(reference, work, disk_gib=2)
    await one.resolve()
    with pytest.raises(SnapshotError, match="more than 2 GB"):
        await one.write(work / "disk.raw")


async def test_an_image_that_does_not_fit_its_disk_is_told(tmp_path, work):
    """Within what may be unpacked, but with what a file system needs on top it is too much."""
    noise = bytes(range(256)) * (1 << 12)
    files = (entry(f"f{number}", noise) for number in range(1015))
    reference = layout(tmp_path / "layout", layer(*files))
    one = image(reference, work, disk_gib=1)
    await one.resolve()
    with pytest.raises(SnapshotError, match="does not fit on a disk of 1 GB"):
        await one.write(work / "disk.raw")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda place: (place / "index.json").write_text("{"), "index|JSON|json|unexpected"),
        (lambda place: next(iter((place / "blobs" / "sha256").iterdir())).unlink(), "no such file|not exist"),
    ],
)
async def test_a_broken_layout_is_told(tmp_path, work, harm, words):
    place = tmp_path / "layout"
    reference = layout(place, layer(folder("d")))
    harm(place)
    with pytest.raises(SnapshotError, match=f"(?i){words}"):
        one = image(reference, work)
        await one.resolve()
        await one.write(work / "disk.raw")


@pytest.mark.parametrize("reference", ["--help", "a b", "oci:relative:tag", "x\ny"])
def test_references_that_are_none(reference, work):
    with pytest.raises(SnapshotError):
        image(reference, work)


async def test_a_registry_with_a_password(tmp_path, work):
    reference = layout(tmp_path / "layout", layer(entry("file", b"private")))
    with oci_made.registry(tmp_path / "registry", password=True) as address:
        oci_made.push(reference, f"{address}/some/app:1", creds="someone:pass word")
        name = f"{address}/some/app:1"
        for more in ({}, {"username": "someone", "password": "wrong-secret"}):
            with pytest.raises(SnapshotError, match=r"(?i)auth") as refused:
                await image(name, tmp_path, **more).resolve()
            assert "wrong-secret" not in str(refused.value)
            (tmp_path / "auth.json").unlink(missing_ok=True)
        one = image(name, work, username="someone", password="pass word")
        found = await one.resolve()
        await one.write(work / "disk.raw")
        raw = subprocess.run(
            ["skopeo", "inspect", "--raw", "--tls-verify=false", "--creds=someone:pass word", f"docker://{name}"],
            capture_output=True,
        ).stdout
        assert found.digest == "sha256:" + hashlib.sha256(raw).hexdigest()
        with pytest.raises(SnapshotError, match=r"(?i)manifest unknown|not found"):
            (work / "auth.json").unlink()
            await image(f"{address}/some/app:2", work, username="someone", password="pass word").resolve()

"""Images that were made to do harm: each is refused with a typed error or does none; nothing outside its folder is written."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oci_made import entry, folder, layer, layout

from instavm.contract.snapshots import Pull
from instavm.errors import SnapshotError
from instavm.node.images import oci
from instavm.node.images.layout import opened

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def work(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    return work


async def written(reference, work):
    """The disk that an image becomes. Raises SnapshotError."""
    one = oci.Image(Pull(reference), work, lambda line: None)
    await one.resolve()
    await one.write(work / "disk.raw")
    return work / "disk.raw"


def described(place: Path, change, which="manifest"):
    """Rewrite an image's manifest or configuration."""
    blobs = place / "blobs" / "sha256"
    index = json.loads((place / "index.json").read_text())
    about = index["manifests"][0]
    manifest = json.loads((blobs / about["digest"][7:]).read_text())
    if which == "config":
        config = json.loads((blobs / manifest["config"]["digest"][7:]).read_text())
        manifest["config"].update(put(blobs, change(config)))
    else:
        manifest = change(manifest)
    about.update(put(blobs, manifest))
    (place / "index.json").write_text(json.dumps(index))


def put(blobs, told):
    data = json.dumps(told).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def nothing_mounted(work):
    return str(work) not in Path("/proc/self/mountinfo").read_text()


EMPTY = {
    "no layer": (),
    "an empty layer": (layer(),),
    "three empty layers": (layer(), layer(), layer()),
    "only whiteouts": (layer(entry(".wh.etc"), entry("a/.wh..wh..opq")),),
}


@pytest.mark.parametrize("name", EMPTY)
async def test_an_image_with_nothing_in_it_is_refused(tmp_path, work, name):
    with pytest.raises(SnapshotError, match=r"no layers|no file in them"):
        await written(layout(tmp_path / "layout", *EMPTY[name]), work)
    assert not (work / "tree").exists() and not (work / "disk.raw").exists() and nothing_mounted(work)


@pytest.mark.parametrize("packed", ["gzip", "zstd"])
async def test_the_same_layer_twice_is_the_same_as_once(tmp_path, work, packed):
    same = layer(entry("file", b"here"), folder("d"))
    disk = await written(layout(tmp_path / "layout", same, same, packed=packed), work)
    cat = subprocess.run(["debugfs", "-R", "cat /file", disk], capture_output=True, text=True)
    assert cat.stdout == "here"


def resized(manifest):
    manifest["layers"][0]["size"] += 7
    return manifest


MANIFESTS = {
    "another size": resized,
    "a digest of nothing": lambda told: told | {"layers": [told["layers"][0] | {"digest": "sha256:" + "0" * 64}]},
    "a digest that is a path": lambda told: (
        told | {"layers": [told["layers"][0] | {"digest": "sha256:../../../etc/shadow"}]}
    ),
    "another kind of digest": lambda told: told | {"layers": [told["layers"][0] | {"digest": "md5:" + "0" * 32}]},
    "layers that are none": lambda told: told | {"layers": "all"},
    "a layer that is none": lambda told: told | {"layers": [7]},
    "no list of layers": lambda told: {name: told[name] for name in told if name != "layers"},
    "no configuration": lambda told: {name: told[name] for name in told if name != "config"},
}
CONFIGS = {
    "another sum of what a layer unpacks to": lambda told: (
        told | {"rootfs": {"type": "layers", "diff_ids": ["sha256:" + "1" * 64]}}
    ),
    "fewer sums than layers": lambda told: told | {"rootfs": {"type": "layers", "diff_ids": []}},
    "variables that are no list": lambda told: told | {"config": {"Env": 7}},
    "labels that are no object": lambda told: told | {"config": {"Labels": ["a"]}},
    "a configuration that is a list": lambda told: told | {"config": [1]},
}


@pytest.mark.parametrize("name", [*MANIFESTS, *CONFIGS])
async def test_what_does_not_fit_together_is_refused(tmp_path, work, name):
    place = tmp_path / "layout"
    reference = layout(place, layer(entry("file", b"x" * 5000)))
    if name in MANIFESTS:
        described(place, MANIFESTS[name])
    else:
        described(place, CONFIGS[name], "config")
    with pytest.raises(SnapshotError):
        await written(reference, work)
    assert not (work / "disk.raw").exists() and nothing_mounted(work)


def pax(**headers):
    info = entry("file", b"x")[0]
    info.pax_headers = {name.replace("_", "."): value for name, value in headers.items()}
    return info


async def test_a_second_piece_of_a_compressed_layer_is_looked_at_too(tmp_path, work):
    """Readers differ in whether they go on behind the end of the first one: what is looked through must be what is unpacked."""
    first, second = layer(entry("fine", b"x")), layer(entry("../../escaped", b"x"))
    packed = gzip.compress(first[: 512 * 2]) + gzip.compress(second)
    place = tmp_path / "layout"
    reference = layout(place, first)
    blobs = place / "blobs" / "sha256"
    digest = hashlib.sha256(packed).hexdigest()
    (blobs / digest).write_bytes(packed)
    described(
        place, lambda told: told | {"layers": [told["layers"][0] | {"digest": f"sha256:{digest}", "size": len(packed)}]}
    )
    with opened(blobs / digest) as file:
        assert file.read() == first[: 512 * 2] + second
    with pytest.raises(SnapshotError, match="leads out of it"):
        await written(reference, work)
    assert not (work / "tree").exists()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
async def test_a_header_without_an_end_is_refused_before_it_is_in_memory(tmp_path, work, kind):
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, 64 << 30
    body = info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)
    with pytest.raises(SnapshotError, match=r"header alone takes|can't be read"):
        await written(layout(tmp_path / "layout", body), work)


async def test_a_sparse_file_counts_with_the_size_that_it_unpacks_to(tmp_path, work):
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = pax(GNU_sparse_major="0", GNU_sparse_minor="1", GNU_sparse_realsize=str(1 << 50), GNU_sparse_map="0,1")
        info.pax_headers["GNU.sparse.size"] = str(1 << 50)
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(SnapshotError, match="unpacks to more than"):
        await written(layout(tmp_path / "layout", body.getvalue()), work)


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU_sparse_major": "0", "GNU_sparse_minor": "1", "GNU_sparse_map": "a,b", "GNU_sparse_size": "x"},
        {"GNU_sparse_major": "1", "GNU_sparse_minor": "0", "GNU_sparse_realsize": "x"},
        {"GNU_sparse_map": "1,2,3"},
        {"size": "-5"},
    ],
)
async def test_headers_that_make_no_sense_are_a_typed_refusal(tmp_path, work, headers):
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(pax(**headers), io.BytesIO(b"x"))
    with contextlib.suppress(SnapshotError):
        await written(layout(tmp_path / "layout", body.getvalue()), work)


async def test_a_name_that_no_file_system_takes_is_a_typed_refusal(tmp_path, work):
    with pytest.raises(SnapshotError):
        await written(layout(tmp_path / "layout", layer(entry("n" * 5000, b"x"))), work)


@pytest.mark.parametrize("cut", [1, 100, 513, 700])
async def test_a_layer_that_is_cut_off_is_refused(tmp_path, work, cut):
    body = layer(entry("a", b"x" * 400), entry("b", b"y" * 400))[: 512 * 4]
    with pytest.raises(SnapshotError):
        await written(layout(tmp_path / "layout", body[:-cut]), work)


HOSTILE_NAMES = """
a a/b way way/in way/in/deep ./a /a /etc/x a/../b ../x dev/null dev . a//b
.wh.a a/.wh.b .wh.way way/.wh.secret .wh..wh..opq way/.wh..wh..opq a/.wh.. .wh.
"""
NAMES = st.sampled_from(HOSTILE_NAMES.split())
TARGETS = st.sampled_from(
    ("VICTIM", "VICTIM/secret", "/", "..", "../..", "../../victim", "a", "way", "way/secret", ".")
)
ENTRIES = st.one_of(
    st.builds(lambda name: folder(name or "."), NAMES),
    st.builds(lambda name: entry(name, b"written"), NAMES),
    st.builds(lambda name, target: ("link", name, target), NAMES, TARGETS),
    st.builds(lambda name, target: ("hard", name, target), NAMES, TARGETS),
    st.builds(lambda name: entry(name, kind=tarfile.FIFOTYPE), NAMES),
    st.builds(lambda name: entry(name, kind=tarfile.CHRTYPE), NAMES),
)


def made(planned, victim):
    for one in planned:
        if one[0] in ("link", "hard"):
            kind, name, target = one
            yield entry(name, **{kind: target.replace("VICTIM", str(victim))})
        else:
            yield one


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(ENTRIES, min_size=1, max_size=5), min_size=1, max_size=3))
def test_no_order_of_links_and_whiteouts_leads_out(tmp_path_factory, planned):
    """Links planted earlier and written through, hard links, whiteouts: refused, or inside; what lies outside stays as it is."""
    place = tmp_path_factory.mktemp("hostile")
    victim, work = place / "victim", place / "work"
    for one in (victim, work):
        one.mkdir()
    (victim / "secret").write_text("the host's")
    before = outside(place)
    reference = layout(place / "layout", *(layer(*made(entries, victim)) for entries in planned))
    with contextlib.suppress(SnapshotError):
        anyio.run(written, reference, work)
    assert outside(place) == before
    assert {path.name for path in work.iterdir()} <= {"layout", "tree", "disk.raw", "auth.json"}
    assert nothing_mounted(work)


def outside(place):
    victim = place / "victim"
    told = {
        path.name: (path.lstat().st_mtime_ns, path.lstat().st_nlink, path.lstat().st_mode) for path in victim.iterdir()
    }
    return told, (victim / "secret").read_text(), victim.lstat().st_mode, sorted(os.listdir(place.parent))

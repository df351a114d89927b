"""Changing an image's tree must never change the host's."""

from __future__ import annotations

from instavm.node.images import trees


def test_nothing_is_removed_through_a_link(tmp_path):
    outside, tree = tmp_path / "outside", tmp_path / "tree"
    (outside / "sub").mkdir(parents=True)
    (outside / "sub" / "precious").touch()
    (tree / "real").mkdir(parents=True)
    (tree / "real" / "file").touch()
    (tree / "real" / "folder").mkdir()
    (tree / "link").symlink_to(outside)
    (tree / "real" / "out").symlink_to(outside / "sub")
    trees.remove(tree, ["*/*", "*/*/*", "link/sub/*"])
    assert (outside / "sub" / "precious").exists()
    assert list((tree / "real").iterdir()) == []


def test_copying_replaces_a_link_and_sets_plain_modes(tmp_path):
    source, tree = tmp_path / "source", tmp_path / "tree"
    (source / "etc").mkdir(parents=True)
    (tree / "etc").mkdir(parents=True)
    (source / "etc" / "resolv.conf").write_text("ours")
    (source / "etc" / "resolv.conf").chmod(0o600)
    (tmp_path / "hosts-own").write_text("host")
    (tree / "etc" / "resolv.conf").symlink_to(tmp_path / "hosts-own")
    trees.copy(source, tree)
    assert (tmp_path / "hosts-own").read_text() == "host"
    assert (tree / "etc" / "resolv.conf").read_text() == "ours"
    assert (tree / "etc" / "resolv.conf").stat().st_mode & 0o777 == 0o644

"""A build is kept under a name that changes with everything it is made of, and with nothing else."""

from __future__ import annotations

import os
import shutil

import pytest

from instavm.node.images import recipes, rootfs, system


@pytest.fixture
def recipe(tmp_path):
    """A copy of the default image's recipe."""
    return shutil.copytree(recipes.recipe_dir("default"), tmp_path / "default")


def edit_package_list(recipe):
    (recipe / "packages.txt").write_text((recipe / "packages.txt").read_text() + "cowsay\n")


def edit_hook(recipe):
    (recipe / "customize.sh").write_text("true\n")


def add_file(recipe):
    (recipe / "overlay" / "etc" / "motd").write_text("")


def rename_file(recipe):
    (recipe / "overlay/etc/npmrc").rename(recipe / "overlay/etc/npmrc2")


def make_executable(recipe):
    (recipe / "overlay/etc/npmrc").chmod(0o755)


@pytest.mark.parametrize("edit", [edit_package_list, edit_hook, add_file, rename_file, make_executable])
def test_every_edit_of_a_recipe_changes_its_digest(recipe, edit):
    before = recipes.tree_digest(recipe)
    edit(recipe)
    assert recipes.tree_digest(recipe) != before


def test_times_and_python_caches_do_not_change_a_digest(recipe):
    before = recipes.tree_digest(recipe)
    os.utime(recipe / "packages.txt", (1, 1))
    (recipe / "__pycache__").mkdir()
    (recipe / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert recipes.tree_digest(recipe) == before


def test_an_image_of_another_size_is_another_image():
    assert rootfs.image_key("default", 10) != rootfs.image_key("default", 11)


def test_an_edit_of_the_agent_changes_the_guest_but_not_its_expensive_base(tmp_path, monkeypatch):
    agent = shutil.copytree(system._agent(), tmp_path / "instavm_guest")
    monkeypatch.setattr(system, "_agent", lambda: agent)
    guest, base = system.guest_key(), system.base_key()
    (agent / "__init__.py").write_text("# edited\n")
    assert system.guest_key() != guest
    assert system.base_key() == base


def test_package_lists_have_comments(tmp_path):
    (tmp_path / "packages.txt").write_text("# all\ncurl  # fetch\n\nwget\n")
    assert recipes.packages(tmp_path) == ["curl", "wget"]


def test_the_default_image_has_what_the_mission_asks_for():
    names = set(recipes.packages(recipes.recipe_dir("default")))
    assert {"python3", "python3-pip", "nodejs", "npm", "curl", "wget", "git"} <= names
    assert {"build-essential", "ffmpeg", "imagemagick"} <= names

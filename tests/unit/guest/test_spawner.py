"""What the user's world is made of."""

import os
import stat

from instavm_guest import spawner


def test_folders_of_the_image_are_in_run_again_with_their_mode(tmp_path):
    """An image of PostgreSQL has a /run/postgresql in which its server puts a socket."""
    image, run = tmp_path / "image", tmp_path / "run"
    (image / "postgresql" / "inner").mkdir(parents=True)
    (image / "postgresql" / "old.pid").write_text("1")
    (image / "postgresql").chmod(0o3777)
    run.mkdir()
    spawner._make_run(str(run), spawner._folders(str(image)))
    assert stat.S_IMODE((run / "postgresql").stat().st_mode) == 0o3777
    assert os.listdir(run / "postgresql") == ["inner"]


def test_a_link_in_run_is_not_followed(tmp_path):
    os.symlink("/", tmp_path / "everything")
    assert spawner._folders(str(tmp_path)) == []


def test_run_always_has_a_folder_for_locks(tmp_path):
    spawner._make_run(str(tmp_path), [])
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o1777

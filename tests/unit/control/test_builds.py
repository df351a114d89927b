"""What a build runs: in order, quoted, and nothing that was not asked for."""

import subprocess

import pytest

from instavm.contract.egress import Egress
from instavm.control.builds import reach, steps
from instavm.errors import InvalidInput
from instavm.wire.snapshots import BuildArgs, CreateSnapshot
from instavm.wire.validation import refusal

ALL = {
    "extra_apt_packages": "jq  curl=7.88",
    "extra_pip_packages": "numpy>=1.26 requests[socks]",
    "extra_npm_packages": "@scope/name left-pad@1",
    "git_clone_url": "https://example.org/a b.git",
    "git_clone_branch": "it's",
    "post_build_cmd": "echo $HOME && true",
}


def test_nothing_asked_for_is_nothing_run():
    assert steps({}) == steps(BuildArgs().model_dump()) == []


def test_the_order_and_what_each_runs():
    found = {step.name: step.command for step in steps(BuildArgs.model_validate(ALL).model_dump())}
    assert list(found) == ["apt packages", "pip packages", "npm packages", "git clone", "post_build_cmd"]
    assert "install -q -y --no-install-recommends -- jq curl=7.88" in found["apt packages"]
    assert found["pip packages"].endswith("'numpy>=1.26' 'requests[socks]'")
    assert found["git clone"].endswith("--branch 'it'\"'\"'s' -- 'https://example.org/a b.git' /app/repo")
    assert found["post_build_cmd"] == ALL["post_build_cmd"]


@pytest.mark.parametrize("name", list(ALL))
def test_every_step_is_one_that_a_shell_can_read(name):
    for step in steps(BuildArgs.model_validate({name: ALL[name]} | {"git_clone_url": "u"}).model_dump()):
        assert subprocess.run(["sh", "-n", "-c", step.command]).returncode == 0


@pytest.mark.parametrize("field", ["extra_apt_packages", "extra_pip_packages", "extra_npm_packages"])
@pytest.mark.parametrize("value", ["--allow-all", "a;b", "$(id)", "a b`c`", "x" * 9000, "a|b"])
def test_packages_are_names_and_nothing_else(field, value):
    with pytest.raises(ValueError):
        BuildArgs.model_validate({field: value})


@pytest.mark.parametrize("value", ["--upload-pack=x", "a\nb"])
def test_a_repository_is_no_option(value):
    with pytest.raises(ValueError):
        BuildArgs.model_validate({"git_clone_url": value})


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "oci_image"),
        ({"oci_image": ""}, "oci_image"),
        ({"oci_image": "-x"}, "oci_image"),
        ({"oci_image": "a", "vcpu_count": 9}, "vcpu_count"),
        ({"oci_image": "a", "memory_mb": 64}, "memory_mb"),
        ({"oci_image": "a", "build_args": {"disk_size_gb": 17}}, "build_args"),
        ({"oci_image": "a", "type": "other"}, "type"),
    ],
)
def test_a_refusal_names_the_field_and_what_is_allowed(given, field):
    with pytest.raises(ValueError) as refused:
        CreateSnapshot.model_validate(given)
    told = refusal(refused.value.errors(include_url=False, include_context=False))
    assert isinstance(told, InvalidInput) and told.field == field and told.allowed


def test_null_is_the_same_as_leaving_it_out():
    ask = CreateSnapshot.model_validate(
        {"oci_image": "a", "name": None, "build_args": None, "type": None, "memory_mb": 128}
    )
    assert (ask.type, ask.memory_mb, ask.build_args) == ("user", 256, BuildArgs())


def test_a_password_is_shown_nowhere():
    ask = CreateSnapshot.model_validate(
        {"oci_image": "a", "registry_password": "s3cr3t", "build_args": {"envs": {"K": "v4lue"}}}
    )
    assert "s3cr3t" not in repr(ask) and "s3cr3t" not in ask.model_dump_json() and "v4lue" not in repr(ask)


CLONES = {"git_clone_url": "https://Git.Test/a.git"}


@pytest.mark.parametrize(
    ("args", "policy", "egress"),
    [
        ({}, None, Egress(packages=True)),
        (CLONES, None, Egress(packages=True, domains=("git.test",))),
        ({"git_clone_url": "git@git.test:a"}, None, Egress(packages=True)),
        ({"git_clone_url": "http://10.0.0.1/a"}, None, Egress(packages=True)),
        ({}, {"allow_package_managers": False}, Egress()),
        (CLONES, {"allowed_domains": ["a.test"]}, Egress(packages=True, domains=("a.test", "git.test"))),
        (CLONES, {"allowed_domains": ["git.test"]}, Egress(packages=True, domains=("git.test",))),
        (CLONES, {"allow_https": True}, Egress(packages=True, https=True)),
        (CLONES, {"allow_http": True, "allowed_cidrs": ["10.0.0.0/8"]}, None),
    ],
)
def test_what_a_build_may_reach(args, policy, egress):
    ask = CreateSnapshot.model_validate({"oci_image": "a", "build_args": args, "egress_policy": policy})
    named = Egress(packages=True, http=True, domains=("git.test",), cidrs=("10.0.0.0/8",))
    assert reach(ask) == (named if egress is None else egress)

"""Who takes much of the CPU gives way to who takes little, by a table."""

import pytest

from instavm.node.shares import Use, changed


def uses(**cpus):
    """Sandboxes of two vCPUs, and what they use."""
    return {name: Use(2, 0.0, used) for name, used in cpus.items()}


@pytest.mark.parametrize(
    ("cpus", "give_way"),
    [
        ({"alone": 2.0}, set()),
        ({"quiet": 0.1, "a": 0.5, "b": 0.5, "c": 0.4, "d": 0.5}, {"a", "b", "c", "d"}),
        ({"asleep": 0.0, "a": 1.9}, {"a"}),
        ({"a": 0.5, "b": 0.5}, {"a", "b"}),
        ({"quiet": 0.03, "a": 0.1, "b": 0.12}, {"a", "b"}),
        ({"asleep": 0.0, "asleep too": 0.01}, set()),
    ],
)
def test_who_gives_way(cpus, give_way):
    found = uses(**cpus)
    assert set(changed(found)) == give_way == {name for name, use in found.items() if use.gives_way}
    assert changed(found) == []


def test_it_comes_back_only_when_it_takes_clearly_less():
    found = uses(a=1.0, b=1.0)
    changed(found)
    found["a"].cpus = 0.6
    assert changed(found) == []
    found["a"].cpus = 0.3
    assert changed(found) == ["a"] and not found["a"].gives_way


def test_equal_parts_go_by_vcpus():
    found = {"one": Use(1, 0.0, 0.5), "four": Use(4, 0.0, 0.8)}
    assert changed(found) == ["one"]


def test_use_is_averaged_over_some_seconds():
    use = Use(2, 10.0)
    for second in range(1, 21):
        use.saw(10.0 + second * 0.5, 0.5)
    assert 0.99 < use.cpus <= 1.0
    use.saw(use.used_s, 0.5)
    assert 0.7 < use.cpus < 0.8

"""Errors reach the process that waits for them: with their class, their text and their attributes."""

import copy
import multiprocessing
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest

from instavm import errors
from instavm.client.config import Config
from instavm.client.errors import from_answer, tree

KINDS = sorted(set(tree()), key=lambda kind: kind.__name__)
COPIES = {
    "pickle": lambda exc: pickle.loads(pickle.dumps(exc)),
    "old pickle": lambda exc: pickle.loads(pickle.dumps(exc, 0)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def example(kind):
    if issubclass(kind, errors.InvalidInput):
        return kind("memory_mb", 9, "256 to 8192")
    return kind("what happened", 2.5) if issubclass(kind, errors.RateLimitError) else kind("what happened")


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_the_same_after_it_was_copied(kind, way):
    made = example(kind)
    made.add_note("seen on the way")
    back = COPIES[way](made)
    assert (type(back), str(back), back.args, vars(back)) == (kind, str(made), made.args, vars(made))


def test_an_error_from_an_answer_keeps_the_words_of_the_server():
    made = from_answer(422, b'{"detail": "no", "code": "invalid_input", "field": "env", "allowed": "less"}')
    back = pickle.loads(pickle.dumps(made))
    assert (str(back), back.field, back.allowed) == ("no", "env", "less")


def test_a_value_that_cannot_be_pickled_is_told_by_its_text():
    made = errors.InvalidInput("env", threading.Lock(), "text")
    assert "lock" in pickle.loads(pickle.dumps(made)).value
    assert copy.copy(made).value is made.value


WRONG = ("key", "ftp://nowhere", 300, 0)
SIZES = {"cpu_count": None, "memory_mb": None, "env": None, "metadata": None}


def test_a_pool_hands_an_error_on_and_does_not_hang():
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool, pytest.raises(errors.InvalidInput, match="base_url"):
        pool.apply_async(Config.of, WRONG, SIZES).get(60)
    with ProcessPoolExecutor(1, spawn) as pool, pytest.raises(errors.InvalidInput, match="base_url"):
        pool.submit(Config.of, *WRONG, **SIZES).result(60)

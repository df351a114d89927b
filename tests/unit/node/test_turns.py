import anyio
import pytest

from instavm.node.turns import Turns

pytestmark = pytest.mark.anyio


async def test_they_come_in_order_and_no_more_at_once_than_allowed():
    turns, begun, at_once, most = Turns(2), [], 0, 0

    async def one(number):
        nonlocal at_once, most
        async with turns.one():
            begun.append(number)
            at_once += 1
            most = max(most, at_once)
            await anyio.lowlevel.checkpoint()
            at_once -= 1

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(one, number)
    assert (begun, most) == (list(range(20)), 2)


async def test_one_that_hangs_keeps_nobody_waiting():
    turns = Turns(1, longest_s=0.01)
    async with turns.one():
        with anyio.fail_after(10):
            async with turns.one():
                pass
        async with turns.one():
            pass


async def test_a_turn_that_is_given_up_goes_to_the_next():
    turns = Turns(1)
    with pytest.raises(RuntimeError):
        async with turns.one():
            raise RuntimeError
    async with turns.one():
        with anyio.move_on_after(0.01):
            async with turns.one():
                raise AssertionError("it is not its turn")
    with anyio.fail_after(10):
        async with turns.one():
            pass

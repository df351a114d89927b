"""Small parts of control that need no server."""

import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instavm.control import ids
from instavm.control.accounts import KeyedAccounts, Keys
from instavm.control.rates import Rates
from instavm.control.sessions import contains
from instavm.control.store.database import open_accounts
from instavm.errors import AuthenticationError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=2), JSON, max_size=4)


@pytest.fixture
def anyio_backend():
    return "asyncio"


def test_ids_have_the_shape_that_clients_rely_on():
    assert re.fullmatch(r"vm-[a-z2-7]{10}", ids.new_vm_id())
    assert uuid.UUID(ids.new_session_id()).version == 4
    assert ids.new_key().startswith("instavm_sk_")
    assert len({ids.new_vm_id() for _ in range(1000)}) == 1000


@given(OBJECTS)
def test_metadata_contains_itself_and_every_part_of_it(metadata):
    assert contains(metadata, metadata)
    assert contains(metadata, {})
    for key, value in metadata.items():
        assert contains(metadata, {key: value})


@given(OBJECTS, OBJECTS)
def test_metadata_does_not_contain_what_is_not_there(have, wanted):
    if not wanted.keys() <= have.keys():
        assert not contains(have, wanted)


@pytest.mark.anyio
async def test_a_key_is_stored_as_a_hash_and_can_be_revoked(tmp_path):
    async with open_accounts(tmp_path / "db") as rows:
        keys, accounts = Keys(rows), KeyedAccounts(rows, Rates(100, 100))
        key_id, key = await keys.create("mine", tenant="team")
        assert (await accounts.tenant_of(key)).id == "team"
        listed = (await keys.list())[0]
        assert key not in repr(listed)
        assert key.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert await keys.revoke(key_id)
        assert not await keys.revoke(key_id)
        with pytest.raises(AuthenticationError):
            await KeyedAccounts(rows, Rates(100, 100)).tenant_of(key)

"""Routes of API keys: an account's own."""

from fastapi import APIRouter

from instavm.control.api.description import problems
from instavm.control.api.here import Caller, Here
from instavm.control.store.accounts import KeyRow
from instavm.errors import NotFound
from instavm.wire import keys as wire

router = APIRouter(tags=["keys"])


@router.post("/v1/api-keys/")
async def create(ask: wire.CreateKey, caller: Caller, here: Here) -> wire.NewKey:
    """Make a key. It is shown this once; the server keeps only its hash."""
    key_id, key = await here.keys.create(ask.description, caller.id)
    return wire.NewKey(**dict(_record(await _mine(here, caller, key_id))), key=key, api_key=key)


@router.get("/v1/api-keys/")
async def listing(caller: Caller, here: Here) -> list[wire.Key]:
    """The account's keys that are not revoked, without the keys themselves."""
    return [_record(row) for row in await here.keys.list(caller.id) if row.revoked_at is None]


@router.get("/v1/api-keys/{key_id}", responses=problems(404))
async def get(key_id: int, caller: Caller, here: Here) -> wire.Key:
    """The record of a key."""
    return _record(await _mine(here, caller, key_id))


@router.patch("/v1/api-keys/{key_id}", responses=problems(404))
async def update(key_id: int, ask: wire.UpdateKey, caller: Caller, here: Here) -> wire.Key:
    """Change the description of a key."""
    await _mine(here, caller, key_id)
    if ask.description is not None:
        await here.keys.describe(key_id, ask.description)
    return _record(await _mine(here, caller, key_id))


@router.delete("/v1/api-keys/{key_id}", responses=problems(404))
async def revoke(key_id: int, caller: Caller, here: Here) -> wire.RevokedKey:
    """It is refused from now on, also when it is the one that this request came with."""
    await _mine(here, caller, key_id)
    await here.keys.revoke(key_id, caller.id)
    here.accounts.forget()
    return wire.RevokedKey(id=key_id)


async def _mine(here: Here, caller: Caller, key_id: int) -> KeyRow:
    """Raises: NotFound, also for a key that was revoked or is somebody else's."""
    for row in await here.keys.list(caller.id):
        if row.id == key_id and row.revoked_at is None:
            return row
    raise NotFound(f"there is no API key {key_id}")


def _record(row: KeyRow) -> wire.Key:
    return wire.Key(
        id=row.id,
        description=row.description,
        prefix=row.hint,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
    )

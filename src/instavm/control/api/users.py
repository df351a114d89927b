"""Routes of users: who am I."""

from fastapi import APIRouter

from instavm.control.api.here import Caller
from instavm.wire.users import SshKeys, User

router = APIRouter(tags=["account"])


@router.get("/v1/users/me")
async def me(caller: Caller) -> User:
    """The account that the key belongs to."""
    return User(id=caller.id, email=caller.email, name=caller.name, is_verified=True)


@router.get("/v1/ssh-keys")
async def ssh_keys(_caller: Caller) -> SshKeys:
    """None: the official command line asks for them whenever it says who one is."""
    return SshKeys()

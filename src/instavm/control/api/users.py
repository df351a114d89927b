"""Routes of users: who am I."""

from fastapi import APIRouter

from instavm.control.api.here import Caller
from instavm.wire.users import User

router = APIRouter()


@router.get("/v1/users/me")
async def me(caller: Caller) -> User:
    return User(id=caller.id, email=caller.email, name=caller.name, is_verified=True)

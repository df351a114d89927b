"""Is the server there, and of which version. Needs no key."""

from fastapi import APIRouter, Request

from instavm.control.api.here import Here
from instavm.version import __version__
from instavm.wire.base import PROTOCOL
from instavm.wire.health import Health

router = APIRouter(tags=["server"])


@router.get("/health")
async def health(request: Request, here: Here) -> Health:
    """Whether the server is there, and its version. Needs no key."""
    count = len(here.vms) if request.app.state.private else None
    return Health(status="ok", version=__version__, protocol=PROTOCOL, sandboxes=count)

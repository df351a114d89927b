"""The description of the HTTP API, made from its models: `python -m instavm.control.openapi > docs/openapi.json`."""

from __future__ import annotations

import json
import sys
from typing import Any

from instavm.control.app import described


def description() -> dict[str, Any]:
    """OpenAPI, as the server gives it at /openapi.json."""
    return described().openapi()


if __name__ == "__main__":
    json.dump(description(), sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")

"""Rich outputs of a cell: values and figures as bundles of {MIME type: data}. Runs in the image's Python, see worker.py."""

from __future__ import annotations

import base64
import io
import json
import sys
import traceback
from typing import Any

COUNT_MAX = 64
BYTES_MAX = 8 << 20
"""Of all outputs of one cell together, as JSON."""
FORMS = (
    ("_repr_html_", "text/html"),
    ("_repr_markdown_", "text/markdown"),
    ("_repr_svg_", "image/svg+xml"),
    ("_repr_png_", "image/png"),
    ("_repr_jpeg_", "image/jpeg"),
    ("_repr_latex_", "text/latex"),
    ("_repr_json_", "application/json"),
    ("_repr_javascript_", "application/javascript"),
)
_PIXELS = ("image/png", "image/jpeg")


class Outputs:
    def __init__(self, space: Any) -> None:
        self._space = space

    def add(self, value: object) -> None:
        """Send the richer forms of `value`, if it has any; its text is on stdout already."""
        self.publish(bundle(value))

    def publish(self, found: dict[str, Any]) -> None:
        if not set(found) - {"text/plain"}:
            return
        space, payload = self._space, json.dumps(found, default=str).encode()
        if space.count >= COUNT_MAX or space.shown + len(payload) > BYTES_MAX:
            if not space.cut:
                room = f"at most {COUNT_MAX} of {BYTES_MAX} bytes in all"
                sys.stderr.write(f"[instavm] an output was left out, and so may be others: {room}\n")
            space.cut = True
            return
        space.count += 1
        space.shown += len(payload)
        space.send(payload)

    def figures(self) -> None:
        """Send all figures that pyplot holds open, and close them, as a notebook does."""
        pyplot = sys.modules["matplotlib.pyplot"]
        try:
            for number in pyplot.get_fignums():
                self.add(pyplot.figure(number))
        finally:
            pyplot.close("all")

    def take_pyplot(self) -> None:
        """Show what `show()` is called for."""
        pyplot: Any = sys.modules["matplotlib.pyplot"]
        pyplot.show = lambda *_, **__: self.figures()


def of(space: Any) -> Outputs:
    """The outputs of `space`, made by the first who asks."""
    found: Outputs | None = space.__dict__.get("outputs")
    if found is None:
        found = space.outputs = Outputs(space)
    return found


def bundle(value: object) -> dict[str, Any]:
    """Every form that `value` has; `text/plain` is always there. What fails is told on stderr and left out."""
    kind = type(value)
    found: dict[str, Any] = {}
    if kind is type:
        return {"text/plain": repr(value)}
    whole = getattr(kind, "_repr_mimebundle_", None)
    if whole is not None:
        found.update(_made(lambda: whole(value)) or {})
    for method, mime in FORMS:
        form = getattr(kind, method, None)
        if form is not None and mime not in found:
            made = _made(lambda: form(value))  # noqa: B023 (called at once)
            if made is not None:
                found[mime] = made
    figure = sys.modules.get("matplotlib.figure")
    if figure is not None and isinstance(value, figure.Figure) and "image/png" not in found:
        found["image/png"] = _made(lambda: _png(value))
    if "text/plain" not in found:
        found["text/plain"] = repr(value)
    return {mime: _portable(mime, data) for mime, data in found.items() if data is not None}


def _made(form: Any) -> Any:
    """What the user's method gives, without the metadata that may come with it."""
    try:
        made = form()
    except Exception:
        traceback.print_exc(limit=-3)
        return None
    return made[0] if isinstance(made, tuple) and made else made


def _portable(mime: str, data: Any) -> Any:
    if isinstance(data, bytes):
        return base64.b64encode(data).decode()
    return data.replace("\n", "") if mime in _PIXELS and isinstance(data, str) else data


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    return file.getvalue()

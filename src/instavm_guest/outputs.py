"""Rich outputs of a cell: values and figures as bundles of {MIME type: data}. Runs in the image's Python, see worker.py.

A value says of itself what it likes; portable.py makes of it what the host takes.
"""

from __future__ import annotations

import builtins
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

COUNT_MAX = 64
BYTES_MAX = 8 << 20
"""Of all outputs of one cell together, as JSON."""
CLEAR = "application/vnd.instavm.clear+json"
"""The type of the one output that is none: those before it are to be forgotten."""
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
OURS = "<instavm"


class Outputs:
    def __init__(self, space: Any) -> None:
        self._space = space
        self._clear = False
        """Whether the outputs so far are to go as soon as there is another one."""

    def show(self, value: object) -> None:
        """A last expression's value, in its own way or as text and in its richer forms."""
        if _interactive(self._space) is not None and isinstance(value, sys.modules["IPython.core.macro"].Macro):
            self._space.run_within(value.value)
        elif not self._shows_itself(value):
            text = self._pretty(value)
            if text is None:
                sys.displayhook(value)
                text = ""
            else:
                print(text)
                builtins._ = value  # type: ignore[attr-defined]
            self.publish(self.bundle(value, text))

    def display(self, values: Sequence[Any], options: dict[str, Any]) -> object:
        """What `display(*values, **options)` of a notebook does; with IPython all options of its own."""
        interactive = _interactive(self._space)
        if interactive is not None and options:
            from IPython.display import display  # type: ignore[import-not-found]  # noqa: PLC0415

            return display(*values, **options)
        unknown = sorted(set(options) - {"raw"})
        if unknown:
            raise TypeError(f"display() needs IPython for {unknown[0]!r}, which this image's Python does not have")
        for value in values:
            if options.get("raw"):
                self.published(value)
            elif not self._shows_itself(value):
                found = self.bundle(value)
                if capturing(self._space) is None:
                    print(value if type(value) is str else found["text/plain"])
                self.publish(found)
        return None

    def add(self, value: object) -> None:
        """Send the richer forms of `value`, if it has any; its text is on stdout already."""
        self.publish(self.bundle(value))

    def forms(self, value: object) -> dict[Any, Any]:
        """As `bundle`, but nothing when it has shown itself."""
        return {} if self._shows_itself(value) else self.bundle(value)

    def published(self, found: Any) -> None:
        """A bundle as the user's code has made it; its text goes to stdout."""
        if isinstance(found, Mapping) and "text/plain" in found:
            print(found["text/plain"])
        self.publish(found)

    def publish(self, found: Any) -> None:
        elsewhere = capturing(self._space)
        if elsewhere is not None:
            elsewhere.publish(found)
            return
        payload = self._space.part("portable").encoded(found, self._note)
        if payload is not None:
            self._send(payload)

    def clear(self, wait: bool) -> None:
        """Have the outputs so far forgotten, now or when the next one comes."""
        self._clear = True
        if not wait:
            self._send(None)

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

    def bundle(self, value: object, text: str | None = None) -> dict[Any, Any]:
        """Every form that `value` has; `text/plain` is always there. What fails is told on stderr and left out.

        text: what its `_repr_pretty_` has made of it already; empty when it has made nothing.
        """
        kind = type(value)
        if kind is type:
            return {"text/plain": repr(value)}
        found: dict[Any, Any] = {}
        for mime, made in self._forms(value, kind):
            if mime is None:
                found.update(made)
            elif made is not None and mime not in found:
                found[mime] = made
        figure = sys.modules.get("matplotlib.figure")
        if (
            figure is not None
            and isinstance(value, figure.Figure)
            and not any(str(mime).startswith("image/") for mime in found)
        ):
            found["image/png"] = self._made(lambda: _png(value))
        if "text/plain" not in found:
            text = self._pretty(value) if text is None else text
            found["text/plain"] = text or repr(value)
        return {mime: data for mime, data in found.items() if data is not None}

    def _forms(self, value: Any, kind: Any) -> Iterator[tuple[str | None, Any]]:
        """Each form as (type, data), or a whole bundle as (None, bundle)."""
        interactive = _interactive(self._space)
        formatter = interactive.display_formatter if interactive is not None else None
        whole = _registered(formatter.mimebundle_formatter, value) if formatter is not None else None
        method = getattr(kind, "_repr_mimebundle_", None)
        if whole is None and method is not None:
            whole = lambda: method(value)  # noqa: E731
        if whole is not None:
            yield None, self._whole(self._made(whole))
        for mime, registered in formatter.formatters.items() if formatter is not None else ():
            form = _registered(registered, value) if mime != "text/plain" else None
            if form is not None:
                yield mime, self._made(form)
        for name, mime in FORMS:
            method = getattr(kind, name, None)
            if method is not None:
                yield mime, self._made(lambda: method(value))  # noqa: B023 (called at once)

    def _pretty(self, value: Any) -> str | None:
        """The text that a value's own `_repr_pretty_` makes, for which it takes IPython. None: there is none."""
        if type(value) is type or not hasattr(type(value), "_repr_pretty_"):
            return None
        notebook = self._space.part("notebook").of(self._space)
        if notebook.interactive is None:
            return None
        made: str | None = notebook.interactive.display_formatter.formatters["text/plain"](value)
        return made

    def _whole(self, made: Any) -> Mapping[Any, Any]:
        if made is None or isinstance(made, Mapping):
            return made or {}
        self._note(f"a bundle was left out: it is a {type(made).__name__}, not a dictionary of MIME types")
        return {}

    def _made(self, form: Callable[[], Any]) -> Any:
        """What the user's method gives, without the metadata that may come with it."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                made = form()
        except Exception as exc:
            self._space.tell(exc)
            return None
        for one in caught or ():
            _warn_again(one)
        return made[0] if isinstance(made, tuple) and made else made

    def _shows_itself(self, value: Any) -> bool:
        """Whether it has shown itself, as objects with `_ipython_display_` do."""
        interactive = _interactive(self._space)
        own = getattr(type(value), "_ipython_display_", None) if type(value) is not type else None
        form = None if own is None else lambda: own(value)
        if form is None and interactive is not None:
            form = _registered(interactive.display_formatter.ipython_display_formatter, value)
        if form is None:
            return False
        try:
            form()
        except NotImplementedError:
            return False
        except Exception as exc:
            self._space.tell(exc)
            return False
        return True

    def _note(self, text: str) -> None:
        self._space.streams.say(f"[instavm] {text}\n")

    def _send(self, payload: bytes | None) -> None:
        space = self._space
        if self._clear:
            self._clear = False
            space.send(json.dumps({CLEAR: {}}).encode())
            space.count = space.shown = 0
        if payload is None:
            return
        if space.count >= COUNT_MAX or space.shown + len(payload) > BYTES_MAX:
            if not space.cut:
                self._note(
                    f"an output was left out, and so may be others: at most {COUNT_MAX} of {BYTES_MAX} bytes in all"
                )
            space.cut = True
            return
        space.count += 1
        space.shown += len(payload)
        space.send(payload)


def of(space: Any) -> Outputs:
    """The outputs of `space`, made by the first who asks."""
    found: Outputs | None = space.__dict__.get("outputs")
    if found is None:
        found = space.outputs = Outputs(space)
    return found


def capturing(space: Any) -> Any:
    """Who takes the outputs instead, inside of `%%capture`, or None."""
    interactive = _interactive(space)
    if interactive is None or interactive.display_pub is interactive.publisher:
        return None
    return interactive.display_pub


def _interactive(space: Any) -> Any:
    """IPython's shell, where cells have one."""
    return getattr(space.__dict__.get("notebook"), "interactive", None)


def _registered(formatter: Any, value: Any) -> Callable[[], Any] | None:
    """What somebody has registered with one of IPython's formatters for the type of `value`."""
    try:
        printer = formatter.lookup(value)
    except KeyError:
        return None
    return lambda: printer(value)


def _warn_again(one: Any) -> None:
    """A warning that was held back; one that names a file of ours names none."""
    if one.filename.startswith(OURS) or "/IPython/" in one.filename:
        sys.stderr.write(f"{one.category.__name__}: {one.message}\n")
    else:
        warnings.showwarning(one.message, one.category, one.filename, one.lineno)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    return file.getvalue()

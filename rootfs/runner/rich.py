"""Values in other representations than text: what a notebook would show.

A result is a dict from MIME type to representation: text, base64 of binary ones, and for
`application/json` the JSON value itself. Nothing here may make a command fail, and nothing is imported
that the session has not imported itself.
"""

import base64
import json
import sys

# Bytes of JSON that one command's results may have: some dozens of figures. Larger ones are not
# shown, which is said in their place.
MAX_RESULTS = 8 << 20

# A container beyond this many characters of text is shown as text alone.
_MAX_JSON_TEXT = 64 << 10

_METHODS = (
    ("_repr_html_", "text/html"),
    ("_repr_markdown_", "text/markdown"),
    ("_repr_svg_", "image/svg+xml"),
    ("_repr_png_", "image/png"),
    ("_repr_jpeg_", "image/jpeg"),
    ("_repr_latex_", "text/latex"),
    ("_repr_json_", "application/json"),
    ("_repr_javascript_", "application/javascript"),
)


def _usable(kind, value):
    """`value` as it may be sent, or None."""
    if isinstance(value, tuple) and value:
        value = value[0]  # (data, metadata)
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if kind == "application/json":
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            return None
        return value
    return value if isinstance(value, str) else None


def _call(value, name):
    # Looked up on the type, as Python does for its own special methods: an object that answers to
    # every name (a mock, a proxy) has no representations by that.
    method = getattr(type(value), name, None)
    if method is None or isinstance(value, type):
        return None
    try:
        return method(value)
    except Exception:
        return None


def represent(value, text):
    """All representations of a value whose `repr` is `text`."""
    data = {"text/plain": text}
    bundle = _call(value, "_repr_mimebundle_")
    if isinstance(bundle, tuple) and bundle:
        bundle = bundle[0]
    if isinstance(bundle, dict):
        for kind, shown in bundle.items():
            usable = _usable(kind, shown)
            if isinstance(kind, str) and usable is not None:
                data[kind] = usable
    for name, kind in _METHODS:
        if kind not in data:
            usable = _usable(kind, _call(value, name))
            if usable is not None:
                data[kind] = usable
    if type(value) in (dict, list) and len(text) <= _MAX_JSON_TEXT:
        usable = _usable("application/json", value)
        if usable is not None:
            data.setdefault("application/json", usable)
    return data


class Results:
    """What one command shows."""

    def __init__(self):
        self._entries = []
        self._figures = _Figures()

    def add(self, value, text):
        """A value was echoed or displayed."""
        if self._figures.show(value, self):
            return
        self.put(represent(value, text))

    def put(self, data):
        """Takes a finished result."""
        self._entries.append(data)

    def take(self):
        """The JSON of everything shown since the last call, with the figures left open; b"" for nothing."""
        self._figures.flush(self)
        entries, self._entries = self._entries, []
        if not entries:
            return b""
        whole, size = [], 2
        for data in entries:
            text = json.dumps(data)
            if size + len(text) > MAX_RESULTS - 256:
                text = json.dumps({"text/plain": "[thaw: a result is too large to be shown]"})
                if size + len(text) > MAX_RESULTS:
                    break
            whole.append(text)
            size += len(text) + 1
        return ("[" + ",".join(whole) + "]").encode()

    def display(self, *values, **_options):
        """What the session has as `display`: shows values now, as text and otherwise."""
        for value in values:
            text = repr(value)
            print(text)
            self.add(value, text)


class _Figures:
    """matplotlib's open figures: shown at a command's end or at `plt.show()`, then closed."""

    def __init__(self):
        self._hooked = None

    @staticmethod
    def _pyplot():
        return sys.modules.get("matplotlib.pyplot")

    def show(self, value, results):
        """Shows a value that is an open figure as its picture."""
        pyplot = self._pyplot()
        if pyplot is None or not hasattr(value, "savefig"):
            return False
        try:
            if value.number not in pyplot.get_fignums():
                return False
            self._render(pyplot, value.number, results)
        except Exception:
            return False
        return True

    def flush(self, results):
        """Shows and closes every figure that is open."""
        pyplot = self._pyplot()
        if pyplot is None:
            return
        self._hook(pyplot, results)
        try:
            numbers = pyplot.get_fignums()
        except Exception:
            return
        for number in numbers:
            try:
                self._render(pyplot, number, results)
            except Exception as error:
                print(f"thaw: a figure cannot be drawn: {type(error).__name__}: {error}", file=sys.stderr)
                try:
                    pyplot.close(number)
                except Exception:
                    return

    def _hook(self, pyplot, results):
        # Without a display `show` would only warn.
        if self._hooked is not pyplot:
            self._hooked = pyplot
            pyplot.show = lambda *_arguments, **_options: self.flush(results)

    @staticmethod
    def _render(pyplot, number, results):
        import io

        figure = pyplot.figure(number)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", bbox_inches="tight")
        pyplot.close(number)
        results.put({"text/plain": repr(figure), "image/png": base64.b64encode(drawn.getvalue()).decode()})

"""Values in other representations than text: what a notebook would show.

A result is a dict from MIME type to representation: text, base64 of binary ones, and for JSON types
the JSON value itself. Nothing here may make a command fail, and nothing is imported that the session
has not imported itself.

Results become JSON at once: what a command does to an object later must neither change what it has
shown nor make it unsendable.
"""

import base64
import json
import re

from thaw_runner import figures

# Bytes of JSON that one command's results may have: some dozens of figures.
MAX_RESULTS = 8 << 20

# Of these, what only the notes in place of larger results may use.
_FOR_NOTES = 64 << 10

# A container beyond this many characters of text is shown as text alone.
_MAX_JSON_TEXT = 64 << 10

# What readers of JSON take: less depth than Python's own limit, and numbers that a double can hold.
_MAX_DEPTH = 100
_LONG_NUMBER = re.compile(r"\d{300}")

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

# Not ASCII alone, so that a surrogate without its other half meets `_bytes`, not a reader that refuses it.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _bytes(data):
    return _encode(data).encode("utf-8", "replace")


def _is_shallow(value, left=_MAX_DEPTH):
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return True
    return left > 0 and all(_is_shallow(one, left - 1) for one in value)


def _is_json(value):
    try:
        return _is_shallow(value) and not _LONG_NUMBER.search(_encode(value))
    except Exception:
        return False


def _usable(kind, value):
    """`value` as it may be sent, or None."""
    if isinstance(value, tuple) and value:
        value = value[0]  # (data, metadata)
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if kind == "application/json" or kind.endswith("+json"):
        return value if value is not None and _is_json(value) else None
    return value if isinstance(value, str) else None


def _call(value, name, **options):
    # Looked up on the type, as Python does for its own special methods: an object that answers to
    # every name (a mock, a proxy) has no representations by that.
    try:
        if isinstance(value, type) or getattr(type(value), name, None) is None:
            return None
        return getattr(value, name)(**options)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return None


def _bundle(value):
    """What `_repr_mimebundle_` gives, called as IPython does or, where that fails, without arguments."""
    bundle = _call(value, "_repr_mimebundle_", include=None, exclude=None)
    if bundle is None:
        bundle = _call(value, "_repr_mimebundle_")
    if isinstance(bundle, tuple) and bundle:
        bundle = bundle[0]
    return bundle if isinstance(bundle, dict) else {}


def represent(value, text):
    """All representations of a value whose `repr` is `text`."""
    data = {"text/plain": text}
    _take_bundle(data, _bundle(value))
    for name, kind in _METHODS:
        if kind not in data:
            usable = _usable(kind, _call(value, name))
            if usable is not None:
                data[kind] = usable
    if type(value) in (dict, list) and len(text) <= _MAX_JSON_TEXT and _is_json(value):
        data["application/json"] = value
    return data


def _take_bundle(data, bundle):
    for kind, shown in bundle.items():
        usable = _usable(kind, shown) if isinstance(kind, str) else None
        if usable is not None:
            data[kind] = usable


class Results:
    """What one command shows. `complain` prints the exception that is being handled."""

    def __init__(self, complain):
        self._complain = complain
        self._entries = []
        self._size = 2
        self._figures = figures.Figures(self.put)

    def text(self, value):
        """`repr(value)`, or a stand-in after its failure was printed."""
        try:
            return repr(value)
        except KeyboardInterrupt:
            raise
        except BaseException:
            self._complain()
            return object.__repr__(value)

    def add(self, value, text):
        """A value was echoed or displayed."""
        if not self._figures.show_value(value, text):
            self.put(represent(value, text))

    def put(self, data):
        """Takes a finished result, or a note in its place where it would be too large."""
        texts = (one for one in data.values() if isinstance(one, str))
        entry = b""
        if sum(map(len, texts)) <= MAX_RESULTS:
            try:
                entry = _bytes(data)
            except Exception:
                # Another thread changed it since it was looked at.
                entry = _bytes({"text/plain": str(data.get("text/plain", ""))})
        if not entry or self._size + len(entry) + 1 > MAX_RESULTS - _FOR_NOTES:
            entry = _bytes({"text/plain": "[thaw: this result is too large to be shown]"})
            if self._size + len(entry) + 1 > MAX_RESULTS:
                return
        self._entries.append(entry)
        self._size += len(entry) + 1

    def finish(self):
        """The command is over: shows the figures that it left open."""
        self._figures.finish()

    def take(self):
        """The JSON of everything shown since the last call; b"" for nothing."""
        if not self._entries:
            return b""
        entries, self._entries, self._size = self._entries, [], 2
        return b"[" + b",".join(entries) + b"]"

    def display(self, *values, raw=False, **_options):
        """What the session has as `display`: shows values now, as text and otherwise.

        With `raw`, the values are representations by MIME type already.
        """
        for value in values:
            if raw and isinstance(value, dict):
                data = {"text/plain": ""}
                _take_bundle(data, value)
                print(data["text/plain"])
                self.put(data)
            else:
                text = self.text(value)
                print(text)
                self.add(value, text)

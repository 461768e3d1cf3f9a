"""matplotlib's figures as pictures: at `plt.show()`, as values, and at a command's end.

pyplot is looked for among what the session has imported and never imported from here.
"""

import base64
import os
import sys

_PYPLOT = "matplotlib.pyplot"


class Figures:
    """The open figures of a session; `put` takes their pictures."""

    def __init__(self, put):
        self._put = put
        self._shown = []
        self._hooked = None
        self._pid = os.getpid()
        sys.meta_path.insert(0, _WhenImported(_PYPLOT, self._hook))

    def _hook(self, pyplot):
        # A plain function, since pyplot sets its `__signature__`, which a method does not allow.
        def show(*_arguments, **_options):
            """Shows and closes every open figure."""
            self._close_all(())

        # Without a display the original would only warn.
        pyplot.show = show
        self._hooked = pyplot

    def show_value(self, value, text):
        """Shows a figure that is echoed or displayed; False: it is none.

        It stays open, since the command may go on drawing in it, but its end does not show it again.
        """
        try:
            if not _is_figure(value):
                return False
            self._draw(value, text)
        except Exception as error:
            _complain(error)
            return False
        self._shown.append(value)
        return True

    def finish(self):
        """Shows what a command left open and has not shown, and closes it all."""
        shown, self._shown = self._shown, []
        pyplot = sys.modules.get(_PYPLOT)
        if pyplot is None or os.getpid() != self._pid:
            return  # a clone's pictures would reach nobody
        if pyplot is not self._hooked:
            self._hook(pyplot)  # it came another way than by an import that could be watched
        self._close_all(shown)

    def _close_all(self, shown):
        pyplot = sys.modules.get(_PYPLOT)
        try:
            numbers = pyplot.get_fignums()
        except Exception:
            return  # its import failed half way
        for number in numbers:
            try:
                figure = pyplot.figure(number)
                if not any(figure is one for one in shown):
                    self._draw(figure, repr(figure))
            except Exception as error:
                _complain(error)
            finally:
                pyplot.close(number)

    def _draw(self, figure, text):
        import io

        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", bbox_inches="tight")
        self._put({"text/plain": text, "image/png": base64.b64encode(drawn.getvalue()).decode()})


def _is_figure(value):
    kind = getattr(sys.modules.get("matplotlib.figure"), "Figure", None)
    if kind is not None and isinstance(value, kind):
        return True
    # What pyplot takes for one is one.
    pyplot = sys.modules.get(_PYPLOT)
    if pyplot is None or not hasattr(type(value), "savefig"):
        return False
    return any(pyplot.figure(number) is value for number in pyplot.get_fignums())


def _complain(error):
    print(f"thaw: a figure cannot be drawn: {type(error).__name__}: {error}", file=sys.stderr)


class _WhenImported:
    """Calls `then` with a module once it is imported, before whoever imported it goes on.

    Looking only between commands would be too late: the command that imports pyplot may also be the
    one that calls its `show`.
    """

    def __init__(self, name, then):
        self._name = name
        self._then = then

    def find_spec(self, name, path=None, target=None):
        """Finds nothing but `name`, and that where the others find it."""
        if name != self._name:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                self._attach(spec.loader)
                return spec
        return None

    def _attach(self, loader):
        def exec_module(module):
            del loader.exec_module
            loader.exec_module(module)
            self._then(module)

        try:
            loader.exec_module = exec_module
        except AttributeError:
            pass  # no loader, or one without room for it: pyplot works, its `show` warns

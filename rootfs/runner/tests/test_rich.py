"""What commands show besides text."""

import base64
import os
import unittest

from tests import test_runner

FIGURE = """
class Figure:
    def __init__(self, number=None): self.number = number
    def __repr__(self): return f"<Figure {self.number}>"
    def savefig(self, file, format, bbox_inches):
        if self.number == 13: raise ValueError("unlucky")
        assert (format, bbox_inches) == ("png", "tight")
        file.write(f"PNG {self.number}".encode())
"""

PYPLOT = """
import warnings
from matplotlib.figure import Figure
_open, closed = {}, []
def figure(number=None):
    number = number or max(_open, default=0) + 1
    return _open.setdefault(number, Figure(number))
def get_fignums(): return sorted(_open)
def close(number): del _open[number]; closed.append(number)
def show(*_, **__): warnings.warn("FigureCanvasAgg is non-interactive")
"""


class Rich(unittest.TestCase):
    def setUp(self):
        self.runner = test_runner.Runner()
        self.addCleanup(self.runner.close)

    def shown(self, code, **extra):
        """(stdout, results) of a command that succeeds without complaint."""
        out, err, status = self.runner.run(code, **extra)
        self.assertEqual((err, status), ("", 0))
        return out, self.runner.rich

    def test_a_value_is_one_result_and_nothing_is_none(self):
        self.assertEqual(self.shown("20 + 1"), ("21\n", [{"text/plain": "21"}]))
        self.assertEqual(self.runner.done["rich"], len('[{"text/plain": "21"}]'))
        for code in ("x = 1", "print(2)", "None", "x;"):
            self.assertEqual(self.shown(code)[1], [])
            self.assertNotIn("rich", self.runner.done)

    def test_every_representation(self):
        kinds = {
            "html": "<b>", "markdown": "**", "svg": "<svg/>", "latex": "$x$", "javascript": "1",
            "png": b"\x89PNG", "jpeg": b"\xff\xd8", "json": {"a": [1]},
        }
        methods = "".join(f"    def _repr_{name}_(self): return {value!r}\n" for name, value in kinds.items())
        _, [data] = self.shown(f"class All:\n{methods}    def __repr__(self): return 'All'\nAll()")
        self.assertEqual(
            data,
            {
                "text/plain": "All", "text/html": "<b>", "text/markdown": "**", "image/svg+xml": "<svg/>",
                "text/latex": "$x$", "application/javascript": "1", "application/json": {"a": [1]},
                "image/png": base64.b64encode(b"\x89PNG").decode(), "image/jpeg": base64.b64encode(b"\xff\xd8").decode(),
            },
        )

    def test_bundles(self):
        bundle = "{'text/html': 'from bundle', 'application/vnd.chart.v5+json': {'a': 1}, 'image/png': b'1', 7: 'no', 'x/y': 7}"
        for arguments in ("self, include, exclude", "self, **options", "self"):
            _, [data] = self.shown(
                f"class B:\n    def _repr_mimebundle_({arguments}): return {bundle}, {{}}\n"
                "    def _repr_html_(self): return 'not asked'\n    def __repr__(self): return 'B'\nB()"
            )
            self.assertEqual(
                data,
                {"text/plain": "B", "text/html": "from bundle", "application/vnd.chart.v5+json": {"a": 1}, "image/png": "MQ=="},
            )

    def test_containers_are_json_where_that_is_faithful_and_small(self):
        self.assertEqual(self.shown("{'a': [1, None, 'é']}")[1][0]["application/json"], {"a": [1, None, "é"]})
        for code in (
            "[object]", "{(1, 2): 3}", "[float('nan')]", "(1, 2)", "list(range(100000))",
            # What Python can write and other readers refuse.
            "[10**400]", "x = []\nfor _ in range(200): x = [x]\nx", "x = []; x.append(x)\nx",
        ):
            self.assertEqual(list(self.shown(code)[1][0]), ["text/plain"], code)

    def test_text_that_is_not_unicode_stays_readable(self):
        out, [data] = self.shown("class U:\n    def _repr_html_(self): return 'a\\udc80é'\nU()")
        self.assertEqual(data["text/html"], "a?é")

    def test_failing_representations_fail_nothing(self):
        out, [data] = self.shown(
            "class F:\n    def _repr_html_(self): 1 / 0\n    def _repr_png_(self): raise SystemExit(3)\n"
            "    def _repr_mimebundle_(self, **_): return 5\n    def _repr_svg_(self): return 5\n"
            "    def __repr__(self): return 'F'\nF()"
        )
        self.assertEqual(data, {"text/plain": "F"})
        self.runner.run("class G:\n    def __repr__(self): return 1 / 0\n    def _repr_html_(self): return 'g'")
        for code in ("display(G()); print('on')", "G()"):
            out, err, status = self.runner.run(code)
            self.assertEqual(status, 0)
            self.assertIn("ZeroDivisionError", err)
            self.assertNotIn(test_runner.HOME, err)
            self.assertEqual(self.runner.rich[0]["text/html"], "g")
            self.assertIn("G object at", self.runner.rich[0]["text/plain"])
        self.assertEqual(self.shown("class Any:\n    def __getattr__(self, name): return lambda **_: 'x'\nAny()")[1][0].keys(), {"text/plain"})
        self.assertEqual(list(self.shown("F")[1][0]), ["text/plain"])

    def test_display(self):
        out, shown = self.shown("print(1)\ndisplay([2], 'three')\nprint(4)\ndisplay()\n5")
        self.assertEqual(out, "1\n[2]\n'three'\n4\n5\n")
        self.assertEqual([data["text/plain"] for data in shown], ["[2]", "'three'", "5"])
        out, [data] = self.shown("display({'text/plain': 'p', 'text/html': 'h'}, raw=True)")
        self.assertEqual((out, data), ("p\n", {"text/plain": "p", "text/html": "h"}))

    def test_what_was_shown_does_not_change(self):
        _, [data] = self.shown("l = [1]\ndisplay(l)\nl.append(object())")
        self.assertEqual(data["application/json"], [1])

    def test_results_of_a_failed_command_are_its_own(self):
        self.assertEqual(self.runner.run("display(1); 1 / 0")[2], 1)
        self.assertEqual(self.runner.rich, [{"text/plain": "1"}])
        self.assertEqual(self.shown("x = 1")[1], [])

    def test_the_bound(self):
        self.runner.run("class Big:\n    def __repr__(self): return 'Big'\n    def _repr_html_(self): return 'x' * (3 << 20)")
        _, shown = self.shown("for _ in range(3): display(Big())\n'small'")
        self.assertEqual([data["text/plain"] for data in shown][:2], ["Big", "Big"])
        self.assertIn("too large", shown[2]["text/plain"])
        self.assertEqual(shown[3], {"text/plain": "'small'"})
        _, shown = self.shown("for _ in range(100000): display({'text/plain': '', 'text/html': 'x' * 500}, raw=True)")
        self.assertLessEqual(self.runner.done["rich"], 8 << 20)
        self.assertGreater(len(shown), 10000)
        self.assertIn("too large", self.shown("class Huge:\n    def __repr__(self): return 'y' * (9 << 20)\nHuge()")[1][0]["text/plain"])


class Figures(unittest.TestCase):
    def setUp(self):
        self.runner = test_runner.Runner()
        self.addCleanup(self.runner.close)
        home = os.path.join(self.runner.where, "matplotlib")
        os.mkdir(home)
        for name, text in (("__init__", ""), ("figure", FIGURE), ("pyplot", PYPLOT)):
            with open(os.path.join(home, name + ".py"), "w") as file:
                file.write(text)

    def pictures(self, code):
        out, err, status = self.runner.run(code)
        self.assertEqual((err, status), ("", 0))
        return [base64.b64decode(data.get("image/png", "")).decode() for data in self.runner.rich]

    def test_figures_left_open_are_shown_and_closed(self):
        self.assertEqual(self.pictures("import matplotlib.pyplot as plt\nplt.figure(); plt.figure(); x = 1"), ["PNG 1", "PNG 2"])
        self.assertEqual(self.pictures("plt.get_fignums()"), [""])
        self.assertEqual(self.runner.rich[0]["text/plain"], "[]")
        self.runner.run("plt.figure(); 1 / 0")
        self.assertEqual(len(self.runner.rich), 1)

    def test_show_shows_at_once_even_where_pyplot_is_new(self):
        shown = self.pictures("from matplotlib import pyplot as plt\nplt.figure(); plt.show(); plt.figure(5); plt.show(block=False)\nprint(plt.closed)")
        self.assertEqual(shown, ["PNG 1", "PNG 5"])

    def test_a_figure_as_a_value_is_shown_once(self):
        self.assertEqual(self.pictures("import matplotlib.pyplot as plt\nf = plt.figure()\nf"), ["PNG 1"])
        self.assertEqual(self.pictures("f = plt.figure(2); display(f); plt.figure(3); x = 0"), ["PNG 2", "PNG 3"])
        # Closed, yet still a value with a picture.
        self.assertEqual(self.pictures("f"), ["PNG 2"])
        self.assertEqual(self.pictures("plt.get_fignums()"), [""])

    def test_one_that_cannot_be_drawn_is_closed_and_told_of(self):
        out, err, status = self.runner.run("import matplotlib.pyplot as plt\nplt.figure(13); plt.figure(14); x = 0")
        self.assertEqual((status, len(self.runner.rich)), (0, 1))
        self.assertIn("cannot be drawn: ValueError: unlucky", err)
        self.assertEqual(self.runner.run("plt.get_fignums()")[0], "[]\n")

    def test_pyplot_is_not_imported_for_it(self):
        self.assertEqual(self.runner.run("import sys; 'matplotlib.pyplot' in sys.modules")[0], "False\n")

    def test_a_clone_shows_nothing(self):
        code = "import os, matplotlib.pyplot as plt\nplt.figure()\npid = os.fork()\nif pid: os.waitpid(pid, 0)"
        self.assertEqual(self.pictures(code), ["PNG 1"])


if __name__ == "__main__":
    unittest.main()

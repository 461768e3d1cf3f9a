"""matplotlib's figures, by a package that stands in for it."""

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
    show.__signature__ = None  # the real one does so when it chooses its backend
    number = number or max(_open, default=0) + 1
    return _open.setdefault(number, Figure(number))
def get_fignums(): return sorted(_open)
def close(number): del _open[number]; closed.append(number)
def show(*_, **__): warnings.warn("FigureCanvasAgg is non-interactive")
"""


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

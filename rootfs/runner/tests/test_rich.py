"""What a command shows besides text."""

import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from test_runner import Runner

FAKE_PYPLOT = """
import sys, types
pyplot = types.ModuleType('matplotlib.pyplot')
figures = {}
class Figure:
    def __init__(self, number): self.number = number
    def savefig(self, into, format, bbox_inches): into.write(b'PNG%d' % self.number)
    def __repr__(self): return 'Figure'
def figure(number=None):
    number = number or max(figures, default=0) + 1
    return figures.setdefault(number, Figure(number))
pyplot.figure = figure
pyplot.get_fignums = lambda: list(figures)
pyplot.close = figures.pop
pyplot.show = lambda: print('a warning')
sys.modules['matplotlib.pyplot'] = pyplot
"""


class Rich(unittest.TestCase):
    def setUp(self):
        self.runner = Runner()
        self.addCleanup(self.runner.close)

    def rich(self, code):
        out, err, status = self.runner.run(code)
        self.assertEqual((err, status), ("", 0))
        return self.runner.rich

    def test_a_value_has_its_text_and_nothing_has_nothing(self):
        self.assertEqual(self.rich("1 + 1"), [{"text/plain": "2"}])
        self.assertEqual(self.rich("x = 1"), [])
        self.assertEqual(self.rich("print(1)"), [])
        self.assertEqual(self.rich("{'a': [1]}"), [{"text/plain": "{'a': [1]}", "application/json": {"a": [1]}}])
        self.assertEqual(self.rich("[float('nan')]"), [{"text/plain": "[nan]"}])

    def test_representations_are_taken_as_they_are_and_failures_are_nothing(self):
        code = (
            "class A:\n"
            "  def __repr__(self): return 'A'\n"
            "  def _repr_html_(self): return '<i>', {'meta': 1}\n"
            "  def _repr_png_(self): return b'\\x89P'\n"
            "  def _repr_svg_(self): raise ValueError\n"
            "  def _repr_latex_(self): return 3\n"
            "A()"
        )
        self.assertEqual(self.rich(code), [{"text/plain": "A", "text/html": "<i>", "image/png": "iVA="}])
        bundle = "class B:\n  def _repr_mimebundle_(self): return {'text/x': 'x', 'text/plain': 'y', 7: 'z'}\nB()"
        self.assertEqual(self.rich(bundle), [{"text/plain": "y", "text/x": "x"}])
        everything = "class C:\n  def __getattr__(self, name): return lambda *a: 'no'\n  def __repr__(self): return 'C'\nC()"
        self.assertEqual(self.rich(everything), [{"text/plain": "C"}])

    def test_display_shows_at_once(self):
        self.assertEqual(self.runner.run("display(1, 'x')\n2")[0], "1\n'x'\n2\n")
        self.assertEqual([entry["text/plain"] for entry in self.runner.rich], ["1", "'x'", "2"])

    def test_too_much_is_said(self):
        shown = self.rich("class L:\n  def _repr_html_(self): return 'x' * (9 << 20)\ndisplay(L())\n1")
        self.assertIn("too large", shown[0]["text/plain"])
        self.assertEqual(shown[1], {"text/plain": "1"})

    def test_open_figures_are_drawn_once_and_closed(self):
        self.rich(FAKE_PYPLOT)
        png = {1: "UE5HMQ==", 2: "UE5HMg=="}
        self.assertEqual(self.rich("f = figure(1); g = figure(2)"), [
            {"text/plain": "Figure", "image/png": png[1]}, {"text/plain": "Figure", "image/png": png[2]},
        ])
        self.assertEqual(self.rich("len(figures)"), [{"text/plain": "0"}])
        self.assertEqual(self.rich("figure(1)"), [{"text/plain": "Figure", "image/png": png[1]}])
        out, _, _ = self.runner.run("figure(2); pyplot.show(); len(figures)")
        self.assertEqual(out, "0\n")
        self.assertEqual([entry.get("image/png") for entry in self.runner.rich], [png[2], None])

    def test_lines_leave_at_once_when_somebody_watches(self):
        self.runner.send({"op": "execute", "live": True}, b"print('now'); import time; time.sleep(1); print('then')")
        self.assertEqual(os.read(self.runner.out, 100), b"now\n")
        self.runner.finish()
        self.assertEqual(self.runner.run("print('buffered')")[0], "buffered\n")


if __name__ == "__main__":
    unittest.main()

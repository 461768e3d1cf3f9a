"""What values look like besides text."""

import base64
import unittest

from tests import test_runner


class Results(unittest.TestCase):
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


if __name__ == "__main__":
    unittest.main()

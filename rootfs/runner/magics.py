"""What IPython adds to Python: `!command`, `%magic`, `%%cell magic`, `object?`.

A cell that is valid Python is never touched. Where it is not, the parser's own complaint says
which line to look at, so text inside strings or brackets is never mistaken for a magic.
"""

import os
import re
import shlex
import subprocess
import sys

HOOK = "__thaw_magic__"

_ASSIGNMENT = re.compile(r"^(\s*)([^=!%?'\"()]+?)\s*=\s*([!%])(?!=)(.+)$")
_HELP = re.compile(r"^(\s*)(\?{1,2})?\s*([A-Za-z_][\w.]*)\s*(\?{1,2})?\s*$")
# What works without a `%`, as long as the user has no variable of that name.
_BARE = frozenset(("pip", "cd", "ls", "pwd", "cat", "mkdir", "cp", "mv", "rm", "time", "timeit"))
_SHELL = frozenset(("ls", "cat", "mkdir", "cp", "mv", "rm"))


def rewrite_line(line, names):
    """The Python that a magic line stands for, or None if it is no magic."""
    stripped = line.lstrip()
    indent = line[: len(line) - len(stripped)]
    if stripped.startswith("!!"):
        return f"{indent}{HOOK}.capture({stripped[2:]!r})"
    if stripped.startswith("!"):
        return f"{indent}{HOOK}.system({stripped[1:]!r})"
    if stripped.startswith("%") and not stripped.startswith("%%"):
        return f"{indent}{HOOK}.line({stripped[1:].rstrip()!r})"
    assignment = _ASSIGNMENT.match(line)
    if assignment:
        indent, target, kind, rest = assignment.groups()
        call = "capture" if kind == "!" else "line"
        return f"{indent}{target} = {HOOK}.{call}({rest.strip()!r})"
    help_ = _HELP.match(line)
    if help_ and (help_.group(2) or help_.group(4)):
        return f"{help_.group(1)}{HOOK}.help({help_.group(3)!r})"
    word = stripped.split(None, 1)[0] if stripped else ""
    if word in _BARE and word not in names:
        return f"{indent}{HOOK}.line({stripped.rstrip()!r})"
    return None


def rewrite(source, names, parse):
    """Replaces magic lines until `parse(source)` succeeds.

    Raises the SyntaxError of the first line that is neither Python nor a magic.
    """
    start = source.lstrip()
    if start.startswith("%%"):
        head, _, body = start[2:].partition("\n")
        return f"{HOOK}.cell({head.strip()!r}, {body!r})"
    lines = source.split("\n")
    for _ in range(len(lines) + 1):
        try:
            parse("\n".join(lines))
            break
        except SyntaxError as error:
            at = (error.lineno or 0) - 1
            if not 0 <= at < len(lines):
                raise
            # A command may go on over lines that end in a backslash.
            last = at
            text = lines[at]
            while text.endswith("\\") and last + 1 < len(lines):
                last += 1
                text = text[:-1] + lines[last]
            replaced = rewrite_line(text, names)
            if replaced is None or replaced == lines[at]:
                raise
            lines[at : last + 1] = [replaced] + [""] * (last - at)
    return "\n".join(lines)


def is_bare(source, names):
    """Whether a cell is one word that only a magic can mean, such as `ls`."""
    return source in _BARE and source not in names


class Lines(list):
    """The lines of a captured command: a list, with IPython's `.s`, `.n` and `.l`."""

    @property
    def l(self):  # noqa: E743 - IPython's name
        return list(self)

    @property
    def n(self):
        return "\n".join(self)

    @property
    def s(self):
        return " ".join(self)


class Magics:
    """Carries magics out. `names` is the user's namespace; `run` runs a cell's source."""

    def __init__(self, names, run):
        self.names = names
        self.run = run

    # Shell ---------------------------------------------------------------------------------

    _FIELD = re.compile(r"\$\$|\$([A-Za-z_]\w*)|\{([^{}]+)\}|\{\{|\}\}")

    def expand(self, command, depth=2):
        """Puts Python values into a command: `$name` and `{expression}`; what does not
        evaluate is left to the shell."""
        frame = sys._getframe(depth)

        def value(found):
            text = found.group(0)
            if text == "$$":
                return "$"
            if text in ("{{", "}}"):
                return text[0]
            name, expression = found.groups()
            if name is not None:
                if name in frame.f_locals:
                    return str(frame.f_locals[name])
                return str(frame.f_globals[name]) if name in frame.f_globals else text
            try:
                return str(eval(expression, frame.f_globals, frame.f_locals))
            except Exception:
                return text

        return self._FIELD.sub(value, command)

    def system(self, command):
        """`!command`"""
        self._shell(self.expand(command))

    def capture(self, command):
        """`x = !command`"""
        done = subprocess.run(
            ["/bin/bash", "-c", self.expand(command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        self.names["_exit_code"] = done.returncode
        return Lines(done.stdout.decode("utf-8", "replace").splitlines())

    def _shell(self, command, argv=None):
        done = subprocess.run(argv or ["/bin/bash", "-c", command], stdin=subprocess.DEVNULL)
        self.names["_exit_code"] = done.returncode
        return done.returncode

    # Dispatch ------------------------------------------------------------------------------

    def line(self, text):
        """`%name rest`"""
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name in _SHELL:
            self._shell(self.expand(text))
            return None
        handler = getattr(self, "line_" + name, None)
        if handler is None:
            raise NameError(f"line magic %{name} is not available")
        return handler(self.expand(rest) if name in ("cd", "pip") else rest)

    def cell(self, head, body):
        """`%%name rest` over the lines below it."""
        name, _, rest = head.partition(" ")
        handler = getattr(self, "cell_" + name, None)
        if handler is None:
            raise NameError(f"cell magic %%{name} is not available")
        return handler(rest.strip(), body)

    def help(self, expression):
        """`object?`"""
        import inspect

        try:
            thing = eval(expression, self.names)
        except Exception:
            print(f"Object `{expression}` not found.")
            return
        try:
            print(f"Signature: {expression}{inspect.signature(thing)}")
        except (TypeError, ValueError):
            pass
        print(f"Type:      {type(thing).__name__}")
        print(f"Docstring: {inspect.getdoc(thing) or '<no docstring>'}")

    # Line magics ---------------------------------------------------------------------------

    def line_pip(self, rest):
        """`%pip install ...` with this interpreter."""
        code = self._shell("", [sys.executable, "-m", "pip"] + shlex.split(rest))
        if code:
            # A cell that goes on without what it wanted to install fails later and less clearly.
            raise subprocess.CalledProcessError(code, "pip " + rest)
        if rest.startswith(("install", "uninstall")):
            import importlib

            importlib.invalidate_caches()
            self._see_user_site()

    @staticmethod
    def _see_user_site():
        # A first `pip install --user` creates a directory that start-up found missing.
        import site

        place = site.getusersitepackages() if site.ENABLE_USER_SITE else None
        if place and os.path.isdir(place) and place not in sys.path:
            site.addsitedir(place)

    def line_cd(self, rest):
        """`%cd directory`, home without one."""
        target = rest.strip("'\"") or "~"
        if target == "-":
            target = self.names.get("_oldcwd", ".")
        before = os.getcwd()
        os.chdir(os.path.expanduser(target))
        self.names["_oldcwd"] = before
        print(os.getcwd())

    def line_pwd(self, _rest):
        """`%pwd`"""
        return os.getcwd()

    def line_env(self, rest):
        """`%env`, `%env NAME`, `%env NAME=value`"""
        if not rest:
            return dict(os.environ)
        name, given, value = rest.partition("=")
        if not given:
            name, given, value = rest.partition(" ")
        if not given:
            return os.environ.get(name)
        os.environ[name.strip()] = self.expand(value.strip(), 3)
        print(f"env: {name.strip()}={os.environ[name.strip()]}")
        return None

    line_set_env = line_env

    def line_time(self, rest):
        """`%time statement`"""
        return self._timed(rest)

    def cell_time(self, _rest, body):
        """`%%time`"""
        return self._timed(body)

    def _timed(self, source):
        import time

        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return self.run(source)
        finally:
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"CPU times: {_duration(cpu)}\nWall time: {_duration(wall)}")

    def line_timeit(self, rest, setup="pass"):
        """`%timeit [-n N] [-r R] statement`"""
        import timeit

        loops, repeats = None, 7
        while True:
            option = re.match(r"-([nr])\s*(\d+)\s+", rest)
            if not option:
                break
            if option.group(1) == "n":
                loops = int(option.group(2))
            else:
                repeats = max(1, int(option.group(2)))
            rest = rest[option.end() :]
        timer = timeit.Timer(rest, setup, globals=self.names)
        if loops is None:
            loops, taken = timer.autorange()
            repeats = max(1, min(repeats, int(2 / max(taken, 1e-9))))
        each = [total / loops for total in timer.repeat(repeats, loops)]
        print(
            f"{_duration(sum(each) / len(each))} per loop, best {_duration(min(each))}"
            f" ({repeats} runs, {loops:,} loops each)"
        )

    def cell_timeit(self, rest, body):
        """`%%timeit setup` over the code below it."""
        self.line_timeit(body, rest or "pass")

    def line_run(self, rest):
        """`%run script.py arguments`"""
        import runpy

        arguments = shlex.split(rest)
        before = sys.argv
        sys.argv = arguments
        try:
            result = runpy.run_path(arguments[0], run_name="__main__")
        finally:
            sys.argv = before
        self.names.update((k, v) for k, v in result.items() if not k.startswith("__"))

    def line_who(self, _rest):
        """`%who`"""
        print("   ".join(sorted(k for k in self.names if not k.startswith("_"))) or "Interactive namespace is empty.")

    def line_matplotlib(self, _rest):
        """Figures are drawn without a display whatever is asked for."""

    line_config = line_autoreload = line_matplotlib

    def line_load_ext(self, rest):
        """Extensions need IPython; `autoreload` is harmless to leave out."""
        if rest != "autoreload":
            print(f"%load_ext: {rest} needs IPython and was not loaded", file=sys.stderr)

    # Cell magics ---------------------------------------------------------------------------

    def cell_bash(self, _rest, body):
        """`%%bash`: one fresh shell for the whole cell; a failure is an exception."""
        code = self._shell(body)
        if code:
            raise subprocess.CalledProcessError(code, "bash")

    cell_sh = cell_bash

    def cell_writefile(self, rest, body):
        """`%%writefile [-a] path`"""
        append = rest.startswith("-a ")
        path = os.path.expanduser((rest[3:] if append else rest).strip().strip("'\""))
        existed = os.path.exists(path)
        with open(path, "a" if append else "w", encoding="utf-8") as file:
            file.write(body)
        print(f"{'Appending to' if append else 'Overwriting' if existed else 'Writing'} {path}")

    cell_file = cell_writefile

    def cell_capture(self, rest, body):
        """`%%capture [name]`"""
        import contextlib
        import io

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.run(body)
        if rest:
            import types

            self.names[rest] = types.SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def _duration(seconds):
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"

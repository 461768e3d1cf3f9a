"""Running one command's source in the session's namespace."""

import ast
import builtins
import linecache
import os
import sys
import traceback
import types

from thaw_runner import magics, rich

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_COROUTINE = 0x80 | 0x100 | 0x200  # CO_COROUTINE, CO_ITERABLE_COROUTINE, CO_ASYNC_GENERATOR

# Sources kept for tracebacks and `inspect.getsource`; functions outlive their cell, so many.
_KEPT_SOURCES = 512


def _future_flags():
    import __future__

    flags = 0
    for name in __future__.all_feature_names:
        flags |= getattr(__future__, name).compiler_flag
    return flags


_FUTURE = _future_flags()


class Session:
    """The user's namespace and everything that lives from one command to the next."""

    def __init__(self):
        main = types.ModuleType("__main__")
        main.__builtins__ = builtins
        sys.modules["__main__"] = main
        self.main = main
        self.names = main.__dict__
        self.outs = {}
        self.names.update(Out=self.outs, _="", __="", ___="")
        self.count = 0
        self.flags = 0
        self.loop = None
        self.magics = magics.Magics(self.names, self._run_nested)
        setattr(builtins, magics.HOOK, self.magics)
        builtins.input = _no_input
        sys.displayhook = self._display
        self._files = []
        self._pid = os.getpid()
        self.results = rich.Results(self._show)
        self.names["display"] = self.results.display

    # Source --------------------------------------------------------------------------------

    def _parse(self, source, name):
        return compile(source, name, "exec", ast.PyCF_ONLY_AST | _AWAIT | self.flags, True)

    def _compile(self, source, name):
        """Code objects for the statements and for the last expression (either may be None)."""
        if magics.is_bare(source.strip(), self.names):
            source = f"{magics.HOOK}.line({source.strip()!r})"
        tree = None
        try:
            tree = self._parse(source, name)
        except SyntaxError:
            pass
        if tree is None:
            # Outside of the handler, so that a traceback shows one error, not two.
            source = magics.rewrite(source, self.names, lambda text: self._parse(text, name))
            tree = self._parse(source, name)
        body = tree.body
        last = None
        if body and isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(";"):
            last = ast.Expression(body.pop().value)
        flags = _AWAIT | self.flags
        first = compile(tree, name, "exec", flags, True) if body else None
        if first is not None:
            self.flags |= first.co_flags & _FUTURE
        if last is not None:
            last = compile(last, name, "eval", flags, True)
        return first, last

    def _remember(self, name, source):
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        self._files.append(name)
        if len(self._files) > _KEPT_SOURCES:
            linecache.cache.pop(self._files.pop(0), None)

    # Running -------------------------------------------------------------------------------

    def run(self, source):
        """Runs a command; its exit code. Every exception is printed here, none leaves."""
        code = self._run(source)
        try:
            self.results.finish()
        except KeyboardInterrupt:
            self._show()
            return 130
        return code

    def _run(self, source):
        self.count += 1
        name = f"<cell {self.count}>"
        self._remember(name, source)
        try:
            first, last = self._compile(source, name)
            if first is not None:
                self._evaluate(first)
            if last is not None:
                value = self._evaluate(last)
                if value is not None:
                    sys.displayhook(value)
            return 0
        except SystemExit as end:
            return _exit_code(end.code)
        except KeyboardInterrupt:
            self._show()
            return 130
        except BaseException:
            self._show()
            return 1

    def _run_nested(self, source):
        """Runs source on behalf of a magic; exceptions pass."""
        name = f"<cell {self.count}>"
        first, last = self._compile(source, name)
        if first is not None:
            self._evaluate(first)
        return self._evaluate(last) if last is not None else None

    def _evaluate(self, code):
        result = eval(code, self.names)
        if code.co_flags & _COROUTINE:
            return self._await(result)
        return result

    def _await(self, coroutine):
        import asyncio

        if self.loop is None or self.loop.is_closed():
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
        task = self.loop.create_task(coroutine)
        try:
            return self.loop.run_until_complete(task)
        except BaseException:
            if not task.done():
                task.cancel()
                try:
                    self.loop.run_until_complete(task)
                except BaseException:
                    pass
            raise

    def is_clone(self):
        """Whether this is a child that a command forked and let run on."""
        return os.getpid() != self._pid

    # Showing -------------------------------------------------------------------------------

    def _display(self, value):
        if value is None:
            return
        text = self.results.text(value)
        names = self.names
        names["___"], names["__"], names["_"] = names.get("__"), names.get("_"), value
        self.outs[self.count] = value
        sys.stdout.write(text + "\n")
        self.results.add(value, text)

    def _show(self):
        """Prints the current exception as Python would, without the runner's own frames."""
        kind, error, trace = sys.exc_info()
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_HERE):
            trace = trace.tb_next
        _cut_own(trace)
        error.__traceback__ = trace
        try:
            sys.last_type, sys.last_value, sys.last_traceback = kind, error, trace
            if sys.excepthook is not sys.__excepthook__:
                sys.excepthook(kind, error, trace)
            elif isinstance(error, RecursionError):
                traceback.print_exception(kind, error, trace, limit=-20)
            else:
                traceback.print_exception(kind, error, trace)
        except BaseException as failure:
            try:
                sys.stderr.write(f"{kind.__name__} (its traceback cannot be shown: {failure!r})\n")
            except BaseException:
                pass


def _cut_own(trace):
    """Takes the runner's frames out of a traceback, wherever they are: its stand-ins for standard output, its magics
    and its signal handler are none of the user's code."""
    while trace is not None and trace.tb_next is not None:
        if trace.tb_next.tb_frame.f_code.co_filename.startswith(_HERE):
            trace.tb_next = trace.tb_next.tb_next
        else:
            trace = trace.tb_next


def _exit_code(code):
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _no_input(prompt=""):
    """Replaces `input`: a command has nobody to ask."""
    if prompt:
        print(prompt, end="")
    raise EOFError("input() cannot ask anybody: a command has no standard input")

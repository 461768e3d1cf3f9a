"""The runner's two loops: commands on the main thread, attendance on another.

The attendant answers what cannot wait for a command's end: the agent's ticks (flush what has
been printed) and renewal after a restore, which may find a command running.
"""

import gc
import os
import resource
import signal
import socket
import sys
import threading
import time

from thaw_runner import cell, output, protocol, renew


class Runner:
    """State shared by both loops."""

    def __init__(self, commands, attend):
        self.outputs = output.Outputs()
        self.session = cell.Session()
        self.commands = protocol.Channel(_adopt(commands))
        self.attend = protocol.Channel(_adopt(attend))
        self.running = False
        signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, _number, _frame):
        # An interrupt that comes after its command must not hit the next one.
        if self.running:
            raise KeyboardInterrupt

    # Commands ------------------------------------------------------------------------------

    def serve_commands(self):
        """Answers messages until the agent closes the socket."""
        handlers = {"execute": self._execute, "warm": self._warm, "freeze": self._freeze}
        self.commands.send({"op": "ready", "version": sys.version.split()[0]})
        while True:
            try:
                body, blob = self.commands.receive()
            except protocol.Closed:
                return
            handlers[body["op"]](body, blob)

    def _execute(self, body, blob):
        extra = body.get("env")
        restore = _set_environment(extra) if extra else None
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = time.process_time_ns()
        try:
            source = blob.decode("utf-8")
        except UnicodeDecodeError as error:
            source = None
            sys.stderr.write(f"SyntaxError: the command is not UTF-8: {error}\n")
        unwatched = self.outputs.begin_live() if body.get("live") else None
        code = 1
        if source is not None:
            try:
                self.running = True
                code = self.session.run(source)
                self.running = False
            except KeyboardInterrupt:
                # Fell between the command's own handling and the line above.
                self.running = False
                code = 130
        if self.session.is_clone():
            self.outputs.flush()
            os._exit(code)
        shown = self.session.results.take()
        if unwatched is not None:
            self.outputs.end_live(unwatched)
        if restore is not None:
            _restore_environment(restore)
        if sys.stdout is not self.outputs.stdout or sys.stderr is not self.outputs.stderr:
            _flush_replaced()
            self.outputs.install()
        out, err = self.outputs.tails()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = (time.process_time_ns() - spent) // 1000
        cpu += int((after.ru_utime - children.ru_utime + after.ru_stime - children.ru_stime) * 1e6)
        done = {"op": "done", "id": body.get("id"), "exit": code, "cpu_us": cpu, "out": len(out), "err": len(err)}
        if shown:
            done["rich"] = len(shown)
        self.commands.send(done, out + err + shown)

    def _warm(self, body, _blob):
        missing = {}
        for name in body["modules"]:
            try:
                __import__(name)
            except BaseException as error:
                missing[name] = f"{type(error).__name__}: {error}"
        # What a first command would otherwise pay for.
        import asyncio  # noqa: F401
        import subprocess  # noqa: F401

        self.outputs.flush()
        self.commands.send({"op": "warmed", "missing": missing})

    def _freeze(self, _body, _blob):
        # What is alive now stays out of collections, which would copy its pages after a restore.
        gc.collect()
        gc.freeze()
        self.commands.send({"op": "frozen"})

    # Attendance ----------------------------------------------------------------------------

    def serve_attendance(self):
        """Answers ticks and renewals until the agent closes the socket."""
        while True:
            try:
                body, blob = self.attend.receive()
            except (protocol.Closed, OSError):
                return
            if body["op"] == "tick":
                self.outputs.flush()
                continue
            try:
                renew.environment(body.get("env", {}))
                renew.reseed(blob)
                self.attend.send({"op": "renewed"})
            except Exception as error:
                self.attend.send({"op": "failed", "reason": f"{type(error).__name__}: {error}"})


def _adopt(fd):
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)


def _set_environment(extra):
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    return before


def _restore_environment(before):
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _flush_replaced():
    """A command may leave its own object in place of `sys.stdout`; it does not outlive it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass


def serve(commands, attend):
    """Runs the runner over two inherited sockets until the agent closes them."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    # One thread of the runner's own must not make every os.fork() warn.
    import warnings

    warnings.filterwarnings("ignore", message=r".*multi-threaded, use of (fork|forkpty)", category=DeprecationWarning)
    runner = Runner(commands, attend)
    threading.stack_size(256 * 1024)
    attendant = threading.Thread(target=runner.serve_attendance, name="thaw-attendant", daemon=True)
    attendant.start()
    threading.stack_size(0)
    runner.serve_commands()
    # Leaves at once: a user's non-daemon thread must not hold up the end of a session.
    runner.outputs.flush()
    os._exit(0)

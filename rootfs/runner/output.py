"""Standard output and error of the user's code.

They are ordinary text streams over descriptors 1 and 2, so that C code and child processes
share them. `print` stays in C; only a flush reaches Python. What is still unflushed when a
command ends travels in its closing message instead of the pipe (see `Raw.hold`). While a
command runs, the agent's ticks flush what a slow command has printed, and every start of a
child process flushes first so that outputs stay in order.
"""

import io
import os
import sys


class Raw(io.RawIOBase):
    """The descriptor under one text stream."""

    def __init__(self, fd):
        self._fd = fd
        self._held = None

    def hold(self):
        """From now on keep what is written instead of writing it."""
        self._held = []

    def release(self):
        """Ends `hold` and returns what was kept."""
        held, self._held = self._held, None
        return b"".join(held) if held else b""

    def writable(self):
        return True

    def fileno(self):
        return self._fd

    def write(self, data):
        held = self._held
        if held is not None:
            held.append(bytes(data))
            return len(data)
        return os.write(self._fd, data)


class Stream(io.TextIOWrapper):
    """`sys.stdout` or `sys.stderr`."""

    def __init__(self, fd, name, line_buffering):
        self.pipe = Raw(fd)
        super().__init__(
            io.BufferedWriter(self.pipe, 16384),
            encoding="utf-8",
            # A lone surrogate must not turn a successful command into a failed one.
            errors="backslashreplace",
            newline="\n",
            line_buffering=line_buffering,
        )
        self.mode = "w"
        self._name = name

    @property
    def name(self):
        return self._name

    def close(self):
        """Closing would lose the session its output; flushing is all that is left of it."""
        self.flush()


class Outputs:
    """Both streams of the session."""

    def __init__(self):
        self.stdout = Stream(1, "<stdout>", False)
        self.stderr = Stream(2, "<stderr>", False)
        self.install()
        os.register_at_fork(before=self.flush, after_in_child=self._in_child)
        sys.addaudithook(self._audit)

    def begin_live(self):
        """From now on each line leaves when it is printed: somebody watches. What to give `end_live`."""
        before = [stream.line_buffering for stream in (self.stdout, self.stderr)]
        self._buffer_lines((True, True))
        return before

    def end_live(self, before):
        """Ends `begin_live`; what the command itself set in between does not outlive it."""
        self._buffer_lines(before)

    def _buffer_lines(self, wanted):
        for stream, line_buffering in zip((self.stdout, self.stderr), wanted):
            try:
                stream.reconfigure(line_buffering=line_buffering)
            except (OSError, ValueError, RuntimeError):
                pass  # a command took it apart

    def install(self):
        """Makes the streams the interpreter's, undoing what a command replaced for good."""
        sys.stdout = sys.__stdout__ = self.stdout
        sys.stderr = sys.__stderr__ = self.stderr

    def flush(self):
        """Writes out what is buffered. Never raises: a closed pipe is the agent's affair."""
        for stream in (self.stdout, self.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, RuntimeError):
                pass

    def tails(self):
        """What is still buffered, without writing it: (stdout, stderr)."""
        tails = []
        for stream in (self.stdout, self.stderr):
            stream.pipe.hold()
            try:
                stream.flush()
            except (OSError, ValueError, RuntimeError):
                pass
            tails.append(stream.pipe.release())
        return tails

    def _in_child(self):
        # No tick reaches a forked child, and it may end by os._exit.
        for stream in (self.stdout, self.stderr):
            stream.pipe.release()
            stream.reconfigure(line_buffering=True)

    _STARTS_A_CHILD = frozenset(
        ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.spawn", "pty.spawn")
    )

    def _audit(self, event, _arguments, _starts=_STARTS_A_CHILD):
        if event in _starts:
            self.flush()

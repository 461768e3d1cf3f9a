"""The runner as its agent sees it: a process with two sockets and two pipes."""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HEADER = struct.Struct("<II")


class Runner:
    """The agent's side, blocking."""

    def __init__(self):
        self.commands, theirs = socket.socketpair()
        self.attend, their_attend = socket.socketpair()
        self.out, out = os.pipe()
        self.err, err = os.pipe()
        self.where = tempfile.mkdtemp()
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(HOME, "main.py")],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=self.where,
            pass_fds=(theirs.fileno(), their_attend.fileno()),
            env=dict(
                os.environ,
                THAW_COMMANDS=str(theirs.fileno()),
                THAW_ATTEND=str(their_attend.fileno()),
                PYTHONDONTWRITEBYTECODE="1",
            ),
            start_new_session=True,
        )
        for fd in (out, err):
            os.close(fd)
        theirs.close()
        their_attend.close()
        assert self.receive()[0]["op"] == "ready"

    def send(self, body, blob=b"", channel=None):
        text = json.dumps(body).encode()
        (channel or self.commands).sendall(HEADER.pack(len(text), len(blob)) + text + blob)

    def receive(self, channel=None):
        channel = channel or self.commands
        head = self._exactly(channel, HEADER.size)
        json_len, blob_len = HEADER.unpack(head)
        return json.loads(self._exactly(channel, json_len)), self._exactly(channel, blob_len)

    @staticmethod
    def _exactly(channel, size):
        parts = b""
        while len(parts) < size:
            part = channel.recv(size - len(parts))
            assert part, "the runner is gone"
            parts += part
        return parts

    def run(self, code, **extra):
        """(stdout, stderr, exit code) of a command."""
        self.send(dict({"op": "execute"}, **extra), code.encode())
        return self.finish()

    def finish(self):
        out, err = [], []
        while True:
            ready, _, _ = select.select([self.out, self.err, self.commands], [], [], 30)
            assert ready, "no answer"
            for fd, into in ((self.out, out), (self.err, err)):
                if fd in ready:
                    into.append(os.read(fd, 65536))
            if ready == [self.commands]:
                done, blob = self.receive()
                for fd, into in ((self.out, out), (self.err, err)):
                    while select.select([fd], [], [], 0)[0]:
                        into.append(os.read(fd, 65536))
                out.append(blob[: done["out"]])
                err.append(blob[done["out"] :][: done["err"]])
                self.rich = json.loads(blob[done["out"] + done["err"] :] or b"[]")
                self.done = done
                return b"".join(out).decode(), b"".join(err).decode(), done["exit"]

    def close(self):
        for channel in (self.commands, self.attend):
            channel.close()
        self.process.wait(10)
        os.close(self.out)
        os.close(self.err)


class Commands(unittest.TestCase):
    def setUp(self):
        self.runner = Runner()
        self.addCleanup(self.runner.close)

    def out(self, code, **extra):
        out, err, status = self.runner.run(code, **extra)
        self.assertEqual((err, status), ("", 0))
        return out

    def test_state_and_echo(self):
        self.assertEqual(self.out("x = 20"), "")
        self.assertEqual(self.out("x + 1"), "21\n")
        self.assertEqual(self.out("_ * 2"), "42\n")
        self.assertEqual(self.out("x;"), "")
        self.assertEqual(self.out("__name__"), "'__main__'\n")

    def test_output_is_in_order_with_children(self):
        out = self.out("import os, subprocess\nprint(1)\nsubprocess.run(['echo', '2'])\nprint(3)\n_ = os.system('echo 4')\nprint(5)\n!echo 6")
        self.assertEqual(out.split(), ["1", "2", "3", "4", "5", "6"])

    def test_shell_and_magics(self):
        self.assertEqual(self.out("who = 'me'\n!echo hi $who {1+1} $HOME_NOT"), "hi me 2\n")
        self.assertEqual(self.out("x = !printf 'a\\nb\\n'\nx"), "['a', 'b']\n")
        self.assertEqual(self.out("for i in range(2):\n    !echo $i"), "0\n1\n")
        self.assertEqual(self.out("%%bash\necho one\necho two"), "one\ntwo\n")
        self.assertEqual(self.out("%cd /tmp"), "/tmp\n")
        self.assertEqual(self.out("pwd"), "'/tmp'\n")
        self.assertEqual(self.out("text = '''\n!echo no\n%cd /\n'''\ntext"), "'\\n!echo no\\n%cd /\\n'\n")
        self.assertEqual(self.out("(5\n%3)"), "2\n")
        self.assertIn("Wall time", self.out("%time sum(range(10))"))
        self.assertIn("per loop", self.out("%timeit -n 10 -r 2 1+1"))
        self.assertEqual(self.out("!echo it\\'s \"fine\""), "it's fine\n")
        out, err, status = self.runner.run("%%bash\nexit 3")
        self.assertEqual(status, 1)
        self.assertIn("CalledProcessError", err)

    def test_errors(self):
        out, err, status = self.runner.run("def f():\n    return 1/0\nf()")
        self.assertEqual((out, status), ("", 1))
        self.assertIn("return 1/0", err)
        self.assertIn("ZeroDivisionError: division by zero", err)
        self.assertNotIn(HOME, err)
        out, err, status = self.runner.run("x = = 1")
        self.assertEqual(status, 1)
        self.assertIn("SyntaxError", err)
        self.assertNotIn(HOME, err)
        self.assertEqual(self.runner.run("import sys; sys.exit(7)")[2], 7)
        self.assertEqual(self.runner.run("raise SystemExit('bye')")[1:], ("bye\n", 1))
        out, err, status = self.runner.run("def g(): g()\ng()")
        self.assertIn("RecursionError", err)
        out, err, status = self.runner.run("input('? ')")
        self.assertEqual((out, status), ("? ", 1))
        self.assertIn("EOFError", err)
        self.assertEqual(self.out("1"), "1\n")

    def test_await(self):
        self.assertEqual(self.out("import asyncio\nawait asyncio.sleep(0, 5)"), "5\n")
        self.assertEqual(self.out("async def two():\n    yield 1\n    yield 2\nasync for n in two():\n    print(n)"), "1\n2\n")
        self.assertEqual(self.out("asyncio.run(asyncio.sleep(0, 6))"), "6\n")
        self.assertEqual(self.out("[n async for n in two()]"), "[1, 2]\n")

    def test_interrupt_keeps_state(self):
        self.out("kept = 1")
        self.runner.send({"op": "execute"}, b"print('begun', flush=True)\nimport time; time.sleep(60)")
        self.assertEqual(os.read(self.runner.out, 100), b"begun\n")
        os.killpg(self.runner.process.pid, signal.SIGINT)
        out, err, status = self.runner.finish()
        self.assertEqual(status, 130)
        self.assertTrue(err.endswith("KeyboardInterrupt\n"), err)
        self.assertNotIn(HOME, err)
        os.killpg(self.runner.process.pid, signal.SIGINT)
        self.assertEqual(self.out("kept"), "1\n")

    def test_interrupted_await_keeps_the_loop(self):
        self.runner.send({"op": "execute"}, b"import asyncio\nprint('begun', flush=True)\nawait asyncio.sleep(60)")
        self.assertEqual(os.read(self.runner.out, 100), b"begun\n")
        os.killpg(self.runner.process.pid, signal.SIGINT)
        self.assertEqual(self.runner.finish()[2], 130)
        self.assertEqual(self.out("await asyncio.sleep(0, 1)"), "1\n")

    def test_a_tick_flushes(self):
        self.runner.send({"op": "execute"}, b"print('early')\nimport time; time.sleep(1); print('late')")
        time.sleep(0.2)
        self.runner.send({"op": "tick"}, channel=self.runner.attend)
        self.assertEqual(os.read(self.runner.out, 100), b"early\n")
        self.assertEqual(self.runner.finish()[0], "late\n")

    def test_live_lines_leave_as_they_are_printed(self):
        slow = b"import sys, time\nprint('now'); print('part', end=''); time.sleep(1)"
        self.runner.send({"op": "execute", "live": True}, slow)
        self.assertEqual(os.read(self.runner.out, 100), b"now\n")
        self.assertEqual(select.select([self.runner.commands], [], [], 0), ([], [], []))
        self.runner.send({"op": "tick"}, channel=self.runner.attend)
        self.assertEqual(os.read(self.runner.out, 100), b"part")
        self.runner.finish()
        self.runner.send({"op": "execute", "live": True}, b"print('told', file=sys.stderr); time.sleep(1)")
        self.assertEqual(os.read(self.runner.err, 100), b"told\n")
        self.assertEqual(self.runner.finish(), ("", "", 0))
        # Others keep what they print until their end.
        self.runner.send({"op": "execute"}, b"print('now')")
        done, blob = self.runner.receive()
        self.assertEqual((done["out"], blob), (4, b"now\n"))

    def test_live_leaves_the_streams_as_they_were(self):
        self.out("import sys; sys.stdout.reconfigure(line_buffering=True)")
        self.out("1", live=True)
        self.assertEqual(self.out("sys.stdout.line_buffering, sys.stderr.line_buffering"), "(True, False)\n")
        self.runner.run("gone = sys.stdout.detach()", live=True)
        self.assertEqual(self.runner.run("x = 1", live=True)[2], 0)

    def test_large_and_odd_output(self):
        out = self.out("for n in range(100000): print(n)")
        self.assertEqual(out.count("\n"), 100000)
        self.assertEqual(self.out("print('é' * 70000, end='')"), "é" * 70000)
        self.assertEqual(self.out(r"print('\udc80')"), "\\udc80\n")

    def test_fork_and_processes(self):
        out = self.out("import os\nprint('before')\npid = os.fork()\nif pid == 0:\n    print('child')\nelse:\n    os.waitpid(pid, 0); print('parent')")
        self.assertEqual(out, "before\nchild\nparent\n")
        self.assertEqual(self.out("pid > 0"), "True\n")
        out = self.out(
            "import multiprocessing as mp\ndef twice(n): return n*2\n"
            "with mp.get_context('fork').Pool(2) as pool: print(pool.map(twice, [1, 2]))"
        )
        self.assertEqual(out, "[2, 4]\n")
        self.assertEqual(self.out("import pickle\nclass P: pass\ntype(pickle.loads(pickle.dumps(P()))).__name__"), "'P'\n")

    def test_environment(self):
        self.assertEqual(self.out("import os; os.environ['ONCE']", env={"ONCE": "1"}), "'1'\n")
        self.assertEqual(self.out("os.environ.get('ONCE')"), "")

    def test_renew(self):
        self.out("import random, tempfile, ssl; a = random.getstate()")
        self.runner.send({"op": "renew", "env": {"SESSION": "s"}}, bytes(32), self.runner.attend)
        self.assertEqual(self.runner.receive(self.runner.attend)[0], {"op": "renewed"})
        self.assertEqual(self.out("random.getstate() != a, __import__('os').environ['SESSION']"), "(True, 's')\n")

    def test_warm_reports_what_is_missing(self):
        self.runner.send({"op": "warm", "modules": ["json", "no_such_module"]})
        answer = self.runner.receive()[0]
        self.assertEqual(list(answer["missing"]), ["no_such_module"])
        self.runner.send({"op": "freeze"})
        self.assertEqual(self.runner.receive()[0]["op"], "frozen")

    def test_replaced_stdout_does_not_outlive_its_command(self):
        self.out("import sys, io; sys.stdout = io.StringIO(); print('lost')")
        self.assertEqual(self.out("print('seen')"), "seen\n")

    def test_processor_time(self):
        self.out("sum(range(2000000))")
        self.assertGreater(self.runner.done["cpu_us"], 1000)

    def test_threads_print(self):
        self.assertEqual(self.out("import threading\nt = threading.Thread(target=print, args=('hi',)); t.start(); t.join()"), "hi\n")

    def test_not_utf8(self):
        self.runner.send({"op": "execute"}, b"print('\xff')")
        out, err, status = self.runner.finish()
        self.assertEqual((out, status), ("", 1))
        self.assertIn("UTF-8", err)


if __name__ == "__main__":
    unittest.main()

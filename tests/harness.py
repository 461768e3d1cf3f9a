"""The real `thaw serve` as a process, and a client for it. Nothing here is faked.

A server has a data directory of its own, into which the prepared `images` and `templates` of
THAW_TEST_DATA are linked, so that it starts as fast as it would after a restart.
"""

import base64
import contextlib
import json
import os
import pathlib
import queue
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time

import requests

THAW = os.environ.get("THAW_BIN", "")
# How many times slower this host is than those that bounds and amounts in the tests are made for: an emulated one says so.
SLOW = int(os.environ.get("THAW_SLOW", "1"))
PREPARED = pathlib.Path(os.environ.get("THAW_TEST_DATA", "") or ".").resolve()
ROOT = pathlib.Path(__file__).resolve().parent.parent

# A first start on a busy host may have to build its template.
START_BOUND = 240 * SLOW
STOP_BOUND = 60 * SLOW

LIVE = []


def new_key():
    return "instavm_sk_" + secrets.token_hex(24)


class Server:
    """One `thaw serve`. `config` has keys of the configuration, such as `session.max_vms`."""

    def __init__(self, config=None, args=(), key=None, data=None, image="minimal", scheme="http"):
        self.config = {"session.pool.low": 1, "session.pool.high": 2, **(config or {})}
        self.args = list(args)
        self.image = image
        self.scheme = scheme
        # An empty key: the server makes one and prints it before its ready line.
        self.key = new_key() if key is None else key
        self.first_key = None
        self.owns_data = data is None
        self.data = pathlib.Path(data) if data else make_data_dir()
        self.log_path = self.data / "serve.log"
        self.process = None
        self.url = None
        self.ready_line = None

    def start(self):
        env = {name: value for name, value in os.environ.items() if not name.startswith("THAW_")}
        self.first_key = None
        if self.key:
            env["THAW_BOOTSTRAP_KEY"] = self.key
        command = [THAW, "serve", "--listen", "127.0.0.1:0", "--data-dir", str(self.data)]
        command += ["--image", self.image, *self.args]
        for name, value in self.config.items():
            text = value if isinstance(value, str) else json.dumps(value)
            command += ["--set", f"{name}={text}"]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        LIVE.append(self)
        self.lines = queue.Queue()
        threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True).start()
        try:
            self.ready_line = self._next_line()
            if self.ready_line.startswith("first API key"):
                self.first_key = self.ready_line.split()[-1]
                self.ready_line = self._next_line()
        except BaseException:
            self.kill()
            raise
        # "thaw is ready at http://127.0.0.1:40123: ..."
        self.url = next(word for word in self.ready_line.split() if "://" in word).rstrip(":,")
        return self

    @staticmethod
    def _read(stream, lines):
        # Of this process only: an earlier one's output may end after this one's has begun.
        for line in stream:
            lines.put(line.decode().rstrip("\n"))
        lines.put(None)

    def _next_line(self):
        try:
            line = self.lines.get(timeout=START_BOUND)
        except queue.Empty:
            raise AssertionError(f"no ready line within {START_BOUND} s\n{self.log_tail()}") from None
        if line is None:
            code = self.process.wait(timeout=STOP_BOUND)
            raise AssertionError(f"thaw serve ended with {code} before it was ready\n{self.log_tail()}")
        return line

    def log_tail(self, lines=60):
        try:
            text = self.log_path.read_text(errors="replace")
        except FileNotFoundError:
            return "(no log)"
        return "\n".join(text.splitlines()[-lines:])

    def log(self):
        return self.log_path.read_text(errors="replace")

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self, bound=STOP_BOUND):
        code = self.process.wait(timeout=bound)
        if self in LIVE:
            LIVE.remove(self)
        return code

    def kill(self):
        """As a crash: no chance to put anything in order."""
        if self.process and self.process.poll() is None:
            self.process.kill()
        if self.process:
            self.wait()

    def restart(self):
        """The same data directory and key, a new process."""
        assert self.process.poll() is not None, "stop or kill it first"
        return self.start()

    def stop(self):
        """Ends it and removes its data. It must go by itself and leave no process behind."""
        left = []
        try:
            if self.process and self.process.poll() is None:
                workers = self.workers()
                self.terminate()
                code = self.wait()
                left = [pid for pid in workers if wait_gone(pid) is False]
                assert code == 0, f"thaw serve ended with {code}\n{self.log_tail()}"
                assert not left, f"workers outlived their server: {left}"
        finally:
            self.kill()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.owns_data:
                shutil.rmtree(self.data, ignore_errors=True)

    def workers(self):
        """Process ids of this server's VM workers."""
        return [pid for pid in children(self.process.pid) if state(pid) != "Z"]

    def zombies(self):
        return [pid for pid in children(self.process.pid) if state(pid) == "Z"]

    def client(self, key=None):
        return Client(self.url, key or self.key)

    def cli(self, *words, check=True, env=None, stdin=None, bound=120):
        """`thaw WORDS` for this server and data directory."""
        base = {name: value for name, value in os.environ.items() if not name.startswith("THAW_")}
        base |= {"THAW_URL": self.url, "THAW_API_KEY": self.key, "THAW_DATA_DIR": str(self.data)}
        done = subprocess.run(
            [THAW, *words], env=base | (env or {}), input=stdin, capture_output=True, text=True, timeout=bound
        )
        if check:
            assert done.returncode == 0, f"thaw {words} ended with {done.returncode}: {done.stderr}"
        return done

    def new_user(self, name, plan="default"):
        """A user of its own, as a client with that user's key."""
        self.cli("user", "create", name, "--plan", plan)
        key = self.cli("key", "create", "--user", name).stdout.strip()
        client = self.client(key)
        wait_for(lambda: client.get("/v1/users/me").status_code == 200, "the server to know the new key")
        return client

    def metric(self, name, **labels):
        """The value of a metric's sample; 0 when there is none yet."""
        for line in requests_session().get(f"{self.url}/metrics", timeout=30).text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.split("{")[0] == name and all(f'{k}="{v}"' in sample for k, v in labels.items()):
                return float(value)
        return 0.0


class Client:
    """A tenant of a server, over one kept-alive connection."""

    def __init__(self, url, key):
        self.url = url
        self.key = key
        self.http = requests_session()
        if key:
            self.http.headers["X-API-Key"] = key

    def get(self, path, **more):
        return self.http.get(self.url + path, timeout=more.pop("timeout", 60 * SLOW), **more)

    def post(self, path, body=None, **more):
        return self.http.post(self.url + path, json=body, timeout=more.pop("timeout", 90 * SLOW), **more)

    def session(self, **spec):
        reply = self.post("/v1/sessions/session", {"api_key": self.key, **spec})
        assert reply.status_code == 200, reply.text
        return Session(self, reply.json()["session_id"])

    def run(self, code, language="python", **fields):
        """A command that must be answered with 200. Without `session_id` it gets a session of its own."""
        bound = fields.get("timeout", 60) + 30 * SLOW
        reply = self.post("/execute", {"command": code, "language": language, **fields}, timeout=bound)
        assert reply.status_code == 200, f"{reply.status_code} {reply.text[:2000]}"
        return reply.json()

    def task(self, task_id, bound=60):
        """A task's final state."""
        until = time.monotonic() + bound * SLOW
        while True:
            reply = self.get(f"/v1/executions/{task_id}")
            assert reply.status_code == 200, reply.text
            found = reply.json()
            if found["is_complete"]:
                return found
            assert time.monotonic() < until, f"not complete within {bound} s: {found}"

    def copy(self):
        """The same tenant over a connection of its own, for use in another thread."""
        return Client(self.url, self.key)


class Session:
    """A session of a client."""

    def __init__(self, client, session_id):
        self.client = client
        self.id = session_id

    def python(self, code, **fields):
        return self.client.run(code, "python", session_id=self.id, **fields)

    def bash(self, code, **fields):
        return self.client.run(code, "bash", session_id=self.id, **fields)

    def run(self, code, language, **fields):
        return self.client.run(code, language, session_id=self.id, **fields)

    def value(self, expression, **fields):
        """A Python expression's value, by way of JSON."""
        out = self.python(f"import json; print(json.dumps({expression}))", **fields)
        assert out["exit_code"] == 0, out
        return json.loads(out["stdout"])

    def submit(self, code, language="python", **fields):
        """Queues a command; gives the task's id."""
        body = {"command": code, "language": language, "session_id": self.id, **fields}
        reply = self.client.post("/execute_async", body)
        assert reply.status_code == 200, reply.text
        return reply.json()["task_id"]

    def status(self):
        reply = self.client.get(f"/v1/sessions/status/{self.id}")
        assert reply.status_code == 200, reply.text
        return reply.json()

    def kill(self):
        reply = self.client.post("/kill", {"session_id": self.id})
        assert reply.status_code in (200, 404), reply.text

    def copy(self):
        return Session(self.client.copy(), self.id)

    def upload(self, path, data):
        """Writes a file in the guest, in pieces that each fit a request."""
        self.python(f"open({path!r}, 'wb').close()")
        piece = 2 << 20
        for at in range(0, len(data), piece):
            text = base64.b64encode(data[at : at + piece]).decode()
            out = self.python(f"import base64; _ = open({path!r}, 'ab').write(base64.b64decode('{text}'))")
            assert out["exit_code"] == 0, out
        assert self.value(f"__import__('os').path.getsize({path!r})") == len(data)
        self.bash(f"chmod 755 {path}")


def requests_session():
    """Keep-alive, and deaf to proxies and .netrc of the environment."""
    session = requests.Session()
    session.trust_env = False
    return session


def make_data_dir():
    # Beside the prepared data: templates are moved into place by rename, within a file system.
    data = pathlib.Path(tempfile.mkdtemp(prefix="server-", dir=PREPARED))
    for name in ("images", "templates"):
        (PREPARED / name).mkdir(exist_ok=True)
        (data / name).symlink_to(PREPARED / name)
    return data


def children(parent):
    """Process ids of all descendants of a process, dead ones that nobody reaped included."""
    parents = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
    found, todo = [], [parent]
    while todo:
        of = todo.pop()
        below = [pid for pid, ppid in parents.items() if ppid == of]
        found += below
        todo += below
    return found


def state(pid):
    """A process's state letter, or None when it is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def wait_gone(pid, bound=20):
    until = time.monotonic() + bound
    while time.monotonic() < until:
        if state(pid) in (None, "Z"):
            return True
        time.sleep(0.05)
    return False


class Vm:
    """A VM and its session, over plain HTTP."""

    def __init__(self, client, said):
        self.client, self.id, self.session = client, said["vm_id"], said["session_id"]

    def run(self, code, language="python", **more):
        body = {"command": code, "language": language, "session_id": self.session, **more}
        reply = self.client.post("/execute", body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def out(self, code, language="python"):
        done = self.run(code, language)
        assert done["exit_code"] == 0 and not done.get("vm_restarted"), done
        return done["stdout"].strip()

    def fork(self, count):
        reply = self.client.post(f"/v1/vms/{self.id}/fork", {"count": count})
        assert reply.status_code == 200, reply.text
        return reply.json()

    def snapshot(self):
        reply = self.client.post(f"/v1/vms/{self.id}/snapshot", {})
        assert reply.status_code == 200, reply.text
        return reply.json()

    def end(self):
        self.client.http.delete(f"{self.client.url}/v1/vms/{self.id}")


def wait_for(true, what, bound=30, pause=0.05):
    """Until `true()` is; gives what it gave."""
    bound *= SLOW
    until = time.monotonic() + bound
    while True:
        found = true()
        if found:
            return found
        assert time.monotonic() < until, f"waited {bound} s for {what}"
        time.sleep(pause)


def background(work):
    """Runs `work` on a thread; the result is had from `.result()`."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def cpu_ticks(pid):
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    except OSError:
        return 0


def busiest(pids, over=1.0):
    """Which of the processes uses the processor most, measured for a moment."""
    before = {pid: cpu_ticks(pid) for pid in pids}
    time.sleep(over)
    spent = {pid: cpu_ticks(pid) - before[pid] for pid in pids}
    found = max(spent, key=spent.get)
    assert spent[found] > 0, f"none of {spent} does anything"
    return found

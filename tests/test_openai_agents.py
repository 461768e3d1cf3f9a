"""The OpenAI-Agents sandbox backend that the official client ships, against a real server."""

import asyncio
import io
import os
from pathlib import Path

from instavm.integrations.openai_agents import InstaVMSandboxClient, InstaVMSandboxClientOptions


def drive(server, steps):
    """Runs `steps` with a started sandbox and whatever makes another."""

    async def run():
        client = InstaVMSandboxClient(api_key=server.key, base_url=server.url)
        boxes = []

        async def make():
            box = await client.create(options=InstaVMSandboxClientOptions(metadata={"by": "agents"}))
            boxes.append(box)
            await box.start()
            return box

        try:
            await steps(client, await make(), make)
        finally:
            for box in boxes:
                await client.delete(box)

    asyncio.run(asyncio.wait_for(run(), 120))


def test_an_agent_runs_commands_and_moves_files(server):
    async def steps(client, box, make):
        done = await box.exec("sh", "-c", "echo out; echo err >&2; exit 3", shell=False)
        assert (done.exit_code, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
        data = os.urandom(300_000)
        await box.write(Path("deep/file.bin"), io.BytesIO(data))
        assert (await box.read(Path("deep/file.bin"))).read() == data
        assert await box.running()

    drive(server, steps)


def test_a_workspace_goes_on_in_another_sandbox(server):
    async def steps(client, box, make):
        data = os.urandom(5_000)
        await box.write(Path("deep/file.bin"), io.BytesIO(data))
        kept = (await box.persist_workspace()).read()
        assert b"snapshot_id" in kept, kept
        await box.write(Path("deep/file.bin"), io.BytesIO(b"later"))
        other = await make()
        await other.hydrate_workspace(io.BytesIO(kept))
        assert (await other.read(Path("deep/file.bin"))).read() == data
        assert (await box.read(Path("deep/file.bin"))).read() == b"later"

    drive(server, steps)


def test_an_agent_talks_to_a_program_in_a_terminal(server):
    async def steps(client, box, make):
        begun = await box.pty_exec_start("cat", shell=False, tty=True, yield_time_s=0.5)
        assert begun.process_id is not None, begun
        told = b""
        for _ in range(10):
            more = await box.pty_write_stdin(session_id=begun.process_id, chars="hello\n", yield_time_s=0.5)
            told += more.output
            if b"hello" in told:
                break
        assert b"hello" in told

    drive(server, steps)

"""Bytes on a terminal's WebSocket that no client would send: the server closes that socket, and lives."""

import base64
import os
import random
import socket
import struct
import time
import urllib.parse

# Ten minutes before a release; a few seconds in every run.
SECONDS = float(os.environ.get("THAW_FUZZ_SECONDS", "5"))


def connect(server, path):
    address = urllib.parse.urlsplit(server.url)
    wire = socket.create_connection((address.hostname, address.port), timeout=10)
    key = base64.b64encode(os.urandom(16)).decode()
    wire.sendall(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nX-API-Key: {server.key}\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        piece = wire.recv(4096)
        assert piece, head
        head += piece
    assert head.startswith(b"HTTP/1.1 101"), head
    return wire


def frame(rng):
    """A frame that may be right: any opcode, reserved bits, length that lies, masked or not."""
    payload = rng.choice([b"", b'{"type":"resize","cols":1,"rows":1}', b"x" * 200, rng.randbytes(rng.randrange(400))])
    first = rng.choice([0x81, 0x82, 0x88, 0x89, 0x8A, 0x01, 0x00, rng.randrange(256)])
    mask = rng.random() < 0.8
    length = len(payload) if rng.random() < 0.8 else rng.randrange(1 << 40)
    head = bytes([first])
    bit = 0x80 if mask else 0
    if length < 126:
        head += bytes([bit | length])
    elif length < 1 << 16:
        head += bytes([bit | 126]) + struct.pack(">H", length)
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", length)
    if mask:
        key = rng.randbytes(4)
        head += key
        payload = bytes(byte ^ key[n % 4] for n, byte in enumerate(payload))
    return head + payload


def test_no_frame_harms_anybody_but_its_sender(server):
    session = server.client().session(vm_lifetime_seconds=int(SECONDS) + 300)
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    rng = random.Random(seed)
    session.python("kept = 1")
    end, sockets = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        # `cat` swallows what is right; a terminal per round would measure the VM.
        if sockets % 200 == 0:
            made = session.client.post(f"/v1/sessions/{session.id}/pty/sessions", {"command": "stty raw -echo; cat >/dev/null"})
            assert made.status_code == 200, made.text
            path = f"/v1/sessions/{session.id}/pty/{made.json()['id']}/connect"
        with connect(server, path) as wire:
            try:
                for _ in range(rng.randrange(1, 12)):
                    wire.sendall(frame(rng))
            except (BrokenPipeError, ConnectionResetError):
                pass
        sockets += 1
        if sockets % 200 == 199:
            session.client.http.delete(session.client.url + path.replace("/pty/", "/pty/sessions/").removesuffix("/connect"))
    assert sockets > 10
    after = session.python("kept")
    assert after["stdout"] == "1\n", f"after {sockets} sockets: {after}"
    assert "panicked" not in server.log()

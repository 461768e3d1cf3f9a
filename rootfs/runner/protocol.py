"""Messages between the agent and the runner: `<II` lengths, JSON, then raw bytes.

The raw bytes (the "blob") carry source text one way and, the other way, the unflushed end of a
command's output and its rich results: none needs escaping, and a short command costs one write.
"""

import json
import struct

HEADER = struct.Struct("<II")

# A message's JSON is small; its blob is a command's source. Both bounds protect the runner's
# memory from a confused peer, they are never reached in honest use.
MAX_JSON = 1 << 20
MAX_BLOB = 64 << 20


class Closed(Exception):
    """The agent closed its end."""


class Channel:
    """One message socket. `receive` blocks; `send` sends everything."""

    def __init__(self, sock):
        self.sock = sock
        self._buffer = b""

    def receive(self):
        """The next message: (dict, bytes)."""
        self._fill(HEADER.size)
        json_len, blob_len = HEADER.unpack_from(self._buffer)
        if json_len > MAX_JSON or blob_len > MAX_BLOB:
            raise Closed("a message is too long")
        end = HEADER.size + json_len
        self._fill(end + blob_len)
        body = json.loads(self._buffer[HEADER.size : end])
        blob = self._buffer[end : end + blob_len]
        self._buffer = self._buffer[end + blob_len :]
        return body, blob

    def _fill(self, size):
        if len(self._buffer) >= size:
            return
        parts = [self._buffer]
        have = len(self._buffer)
        while have < size:
            part = self.sock.recv(max(16384, min(size - have, 1 << 20)))
            if not part:
                raise Closed("the agent is gone")
            parts.append(part)
            have += len(part)
        self._buffer = b"".join(parts)

    def send(self, body, blob=b""):
        """Sends one message."""
        text = json.dumps(body).encode()
        self.sock.sendall(HEADER.pack(len(text), len(blob)) + text + blob)

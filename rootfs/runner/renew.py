"""Making a restored process an individual: every random generator a clone would share."""

import os
import sys


def environment(variables):
    """Sets the session's environment variables."""
    os.environ.update(variables)


def reseed(seed):
    """Reseeds every generator that this process has loaded. Raises if one cannot be.

    `seed` is at least 32 bytes that no other clone gets.
    """
    fresh = seed + os.urandom(32)
    number = int.from_bytes(fresh, "little")

    random = sys.modules.get("random")
    if random is not None:
        before = random.getstate()
        random.seed(number)
        if random.getstate() == before:
            raise RuntimeError("random kept its state")

    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        words = [int.from_bytes(fresh[at : at + 4], "little") for at in range(0, 64, 4)]
        numpy.seed(words)

    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(number & (2**63 - 1))

    tempfile = sys.modules.get("tempfile")
    if tempfile is not None:
        # Its name generator is keyed by process id, which clones share.
        tempfile._name_sequence = None

    uuid = sys.modules.get("uuid")
    if uuid is not None:
        uuid._node = None
        uuid._last_timestamp = None

    ssl = sys.modules.get("_ssl")
    if ssl is not None:
        ssl.RAND_add(fresh, 32.0)

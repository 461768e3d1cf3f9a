"""Entry of the warm Python runner: `python3 main.py`, started by the agent.

Inherited descriptors: 1 and 2 are the command's pipes; `THAW_COMMANDS` names a stream socket
that commands arrive on, `THAW_ATTEND` one for what must be answered while a command runs.
The runner's modules live in a package of their own name that is not on `sys.path`, so a
user's `output.py` never collides with ours.
"""

import os
import sys
import types


def _package():
    home = os.path.dirname(os.path.abspath(__file__))
    package = types.ModuleType("thaw_runner")
    package.__path__ = [home]
    sys.modules["thaw_runner"] = package
    # The script's directory is where Python looks first; the user's own directory belongs there.
    if sys.path and os.path.abspath(sys.path[0] or ".") == home:
        sys.path[0] = ""
    sys.argv = [""]


if __name__ == "__main__":
    _package()
    from thaw_runner import loop

    loop.serve(int(os.environ.pop("THAW_COMMANDS")), int(os.environ.pop("THAW_ATTEND")))

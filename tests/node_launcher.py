"""Starts a command once for each of some nodes that are all this machine, as srun does: COUNT COMMAND…"""

from __future__ import annotations

import os
import subprocess
import sys


def main() -> None:
    """Wait until all have ended."""
    count, command = int(sys.argv[1]), sys.argv[2:]
    nodes = [
        subprocess.Popen(command, env={**os.environ, "SLURMD_NODENAME": f"n{number}"}, start_new_session=True)
        for number in range(1, count + 1)
    ]
    for node in nodes:
        node.wait()


if __name__ == "__main__":
    main()

"""`python -m etherdiff.sweeps.child_process PARENT COMMAND…`: run COMMAND, which gets SIGTERM if the process PARENT dies.

A sweep that is killed by force must not leave runs behind that nobody counts, and a run that gets SIGTERM saves a checkpoint.
Linux only; elsewhere the commands of a killed sweep end by themselves, and the next start waits for them.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command: what prctl sets outlives exec."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before
        sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()

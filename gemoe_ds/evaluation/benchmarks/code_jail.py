"""The process that a model's program runs in; its own program, which imports nothing of ours.

python -I code_jail.py alone|"" SECONDS MEMORY FILE < program
"""

import ctypes
import os
import resource
import sys

# Exit codes. A program that ends itself, with any code, before its tests are through has failed.
PASSED, FAILED, NO_NETWORK_LEFT = 96, 95, 97
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # of linux/sched.h


def leave_the_network() -> bool:
    """A network of its own, without interfaces. Root may not need, or have, users of its own."""
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    return unshare(NEW_USER | NEW_NETWORK) == 0 or unshare(NEW_NETWORK) == 0


def main() -> None:
    alone, seconds, memory, file = sys.argv[1:]
    program = sys.stdin.buffer.read().decode()
    if alone and not leave_the_network():
        sys.exit(NO_NETWORK_LEFT)
    whole = max(1, round(float(seconds)))
    limits = {
        resource.RLIMIT_CPU: whole,
        resource.RLIMIT_AS: int(memory),
        resource.RLIMIT_FSIZE: int(file),
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    sys.argv = ["program"]
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException:
        os._exit(FAILED)
    os._exit(PASSED)


if __name__ == "__main__":
    main()

"""The process that a model's program runs in; its own program, which imports nothing of ours.

python -I code_jail.py alone|"" SECONDS MEMORY FILE < program

    this process    leaves network, processes and mounts
      the first     of its own processes: with its end all others end, whatever they have become
        the second  the program
"""

import ctypes
import os
import resource
import struct
import sys

# Exit codes of this process; those of the program count for nothing.
PASSED, FAILED, NOT_ALONE = 96, 95, 97
# Of linux/sched.h, linux/mount.h and linux/fcntl.h.
NEW_MOUNTS, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x10000000, 0x20000000, 0x40000000
BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
libc = ctypes.CDLL(None, use_errno=True)


def leave_all_others() -> bool:
    """A network without interfaces, processes of its own, and no file outside this folder that can
    be written. Root may not need, or have, users of its own."""
    new = NEW_MOUNTS | NEW_PROCESSES | NEW_NETWORK
    if libc.unshare(NEW_USER | new) and libc.unshare(new):
        return False
    folder = os.getcwd().encode()
    none = None
    done = (
        libc.mount(none, b"/", none, ctypes.c_ulong(RECURSIVE | PRIVATE), none) == 0
        and libc.mount(folder, folder, none, ctypes.c_ulong(BIND), none) == 0
        and change(b"/", AT_RECURSIVE, READ_ONLY, 0)
        and change(folder, 0, 0, READ_ONLY)
    )
    os.chdir(folder)  # into what is mounted there now
    return done


def change(path: bytes, flags: int, attributes: int, without: int) -> bool:
    told = struct.pack("4Q", attributes, without, 0, 0)
    return libc.syscall(MOUNT_SETATTR, AT_FDCWD, path, flags, told, ctypes.c_size_t(len(told))) == 0


def run(program: str, seconds: str, memory: str, file: str) -> None:
    """Come to its end, or not."""
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
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})


def outcome(child: int) -> int:
    """The exit code of a process when it has ended; FAILED where a signal ended it."""
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else FAILED


def main() -> None:
    alone, *limits = sys.argv[1:]
    program = sys.stdin.buffer.read().decode()
    if alone and not leave_all_others():
        os._exit(NOT_ALONE)
    first = os.fork()
    if first:
        os._exit(outcome(first))
    # A program that ends itself, with any code, has not come to its end: only this word says so.
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    word = os.urandom(16)
    second = os.fork()
    if not second:
        try:
            run(program, *limits)
            os.write(writes, word)
        finally:
            os._exit(0)
    outcome(second)
    try:
        told = os.read(reads, len(word))
    except BlockingIOError:
        told = b""
    os._exit(PASSED if told == word else FAILED)


if __name__ == "__main__":
    main()

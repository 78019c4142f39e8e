"""Starts a server that holds the lock on its data and dies with its parent process.

Run as a file, so that it imports nothing of the package:

    python -I -S launcher.py become|guard PARENT_PID LOCK_PATH PROGRAM ARGUMENT...

`become` (Linux) sets SIGKILL as the parent-death signal and execs the server: one process. `guard`
(elsewhere) runs next to the server and polls the parent.

The lock is a POSIX record lock: it survives exec, is not inherited by the children that the server
forks to rewrite its file, ends with the server however it dies, and reveals its holder's pid.
"""

import ctypes
import fcntl
import os
import signal
import sys
import time

__all__ = ["BUSY", "main"]

#: Exit status where another server holds the lock (EX_TEMPFAIL).
BUSY = 75

#: From <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1

#: Interval at which a guard polls the parent and the server: its only cost.
_PARENT_POLL_SECONDS = 0.1


def main(arguments: list[str]) -> int:
    """Start the server; returns only in a guard, or where the server cannot be started."""
    mode, parent_pid, lock_path, *command = arguments
    if mode == "guard":
        return _guard(int(parent_pid), lock_path, command)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent_pid):
        return BUSY  # The parent exited before PDEATHSIG was set.
    return _become(lock_path, command)


def _become(lock_path: str, command: list[str]) -> int:
    """Take the lock and exec the server; returns only where another process holds the lock."""
    lock = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return BUSY
    os.set_inheritable(lock, True)
    return os.execv(command[0], command)  # noqa: S606 - the purpose: this process, no shell


def _guard(parent_pid: int, lock_path: str, command: list[str]) -> int:
    server_pid = os.fork()
    if server_pid == 0:
        os._exit(_become(lock_path, command))
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.kill(server_pid, signal.SIGTERM))
    while True:
        ended, status = os.waitpid(server_pid, os.WNOHANG)
        if ended:
            return _end_like(os.waitstatus_to_exitcode(status))
        if os.getppid() != parent_pid:
            os.kill(server_pid, signal.SIGKILL)
        time.sleep(_PARENT_POLL_SECONDS)


def _end_like(returncode: int) -> int:
    """End by the same signal as the server, so that our parent sees the cause."""
    if returncode < 0:
        if -returncode != signal.SIGKILL:
            signal.signal(-returncode, signal.SIG_DFL)
        os.kill(os.getpid(), -returncode)
    return returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Starts a server that holds the lock on its data and dies with whoever started it.

Run as a file, so that nothing of the package is imported on the way:

    python -I -S launcher.py become|guard PARENT_PID LOCK_PATH PROGRAM ARGUMENT...

`become` (Linux) asks the kernel for SIGKILL at the parent's death and turns into the server: one
process, no waiting. `guard` (elsewhere) stays beside the server and watches the parent.

The lock is a POSIX record lock: it survives exec, is not inherited by the children that the server
forks to rewrite its file, ends with the server however that dies, and tells its holder's pid.
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

#: How often a guard looks whether parent and server are still there. A guard's only cost is this.
_LOOK_SECONDS = 0.1


def main(arguments: list[str]) -> int:
    """Start the server as asked; returns only in a guard, or where it cannot be started."""
    mode, parent_pid, lock_path, *command = arguments
    if mode == "guard":
        return _guard(int(parent_pid), lock_path, command)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent_pid):
        return BUSY  # The parent died before the kernel was asked.
    return _become(lock_path, command)


def _become(lock_path: str, command: list[str]) -> int:
    """Take the lock and turn into the server; returns only where the lock is taken."""
    lock = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return BUSY
    os.set_inheritable(lock, True)
    return os.execv(command[0], command)  # noqa: S606 - the very point: this process, no shell


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
        time.sleep(_LOOK_SECONDS)


def _end_like(returncode: int) -> int:
    """End by the same signal as the server did, so that our parent sees how it was."""
    if returncode < 0:
        if -returncode != signal.SIGKILL:
            signal.signal(-returncode, signal.SIG_DFL)
        os.kill(os.getpid(), -returncode)
    return returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

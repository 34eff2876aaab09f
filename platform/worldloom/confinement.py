"""What a process that reads untrusted files gives up before it opens one.

Two fences, and neither replaces the other. The kernel's (Linux: a network namespace without interfaces, Landlock,
resource limits) holds for native code too, as far as this kernel and this user's rights go. The interpreter's, an audit
hook, holds on every system, but only for what asks Python: native code does not.

Landlock: https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys

_PDEATHSIG, _NO_NEW_PRIVS = 1, 38  # prctl(2)
_NEWUSER, _NEWNET = 0x1000_0000, 0x4000_0000  # unshare(2)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, the same on every architecture
_EXECUTE = 1 << 0
_CHANGE = 1 << 1 | sum(1 << bit for bit in range(4, 13))  # write to, remove or make any kind of file or folder
_FILE = 1 << 1 | 1 << 5 | 1 << 8  # write to, remove or make a regular file
_REFER, _TRUNCATE = 1 << 13, 1 << 14  # since versions 2 and 3 of Landlock
_TCP = 1 << 0 | 1 << 1  # bind and connect, since version 4
_SCOPES = 1 << 0 | 1 << 1  # abstract sockets and signals stay inside, since version 6

_REFUSED = (
    *("socket.", "ssl.", "subprocess.", "pty.", "shutil.", "tempfile.", "ctypes.", "webbrowser.", "syslog."),
    *(
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "os.fork",
        "os.kill",
        "signal.pthread_kill",
    ),
    *("os.chdir", "os.chflags", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"),
    *("os.setxattr", "os.symlink", "os.truncate", "os.utime", "os.putenv", "os.unsetenv", "os.lockf"),
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(RuntimeError):
    """Code in a confined process asked for something that it gave up."""


def confine_kernel(folder: str) -> None:
    """Leave the network, and lose the right to start programs and to write anywhere but to files in `folder`.

    Linux only; call it before there are threads. What this kernel or this user's rights do not allow is left out.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # end with the parent, however that ends
    if libc.unshare(_NEWNET):
        libc.unshare(_NEWUSER | _NEWNET)  # how a user without rights gets a network namespace
    _landlock(libc, folder)


def _landlock(libc: ctypes.CDLL, folder: str) -> None:
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    refer, truncate = _REFER if version >= 2 else 0, _TRUNCATE if version >= 3 else 0
    # Rights that are handled and not granted below are lost. Older kernels know fewer fields and want a shorter struct.
    ruleset = struct.pack("=QQQ", _CHANGE | refer | truncate | _EXECUTE, _TCP, _SCOPES)
    ruleset = ruleset[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = libc.syscall(_CREATE_RULESET, ruleset, len(ruleset), 0)
    inside = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", _FILE | truncate, inside), 0)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)  # without it only root may restrict itself
    libc.syscall(_RESTRICT_SELF, rules, 0)
    os.close(inside)
    os.close(rules)


def limit_resources(memory: int, seconds: int) -> None:
    """At most `memory` more bytes than now, files no larger than that, `seconds` of processor time. Linux only."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    for kind, limit in (
        (resource.RLIMIT_AS, held + memory),
        (resource.RLIMIT_FSIZE, memory),
        (resource.RLIMIT_CPU, int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def confine_interpreter(folder: str) -> None:
    """From now on Python raises `Refused` for sockets, new processes, changed paths, and writing outside `folder`.

    `folder` is absolute. This cannot be taken back. Import what is needed before: ctypes is refused too.
    """
    inside = f"{os.path.normpath(folder)}{os.sep}"
    refused, writes, isabs, normpath, fsdecode = _REFUSED, _WRITES, os.path.isabs, os.path.normpath, os.fsdecode

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event.startswith(refused):
            raise Refused(f"{event} is refused here")
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & writes and not isinstance(path, int):
                # Absolute, because a relative path may start at any open folder (dir_fd), which the event leaves out.
                name = fsdecode(path)  # pyright: ignore[reportArgumentType]
                if not isabs(name) or not normpath(name).startswith(inside):
                    raise Refused(f"writing {name!r} is refused here")

    sys.addaudithook(hook)

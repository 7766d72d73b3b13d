"""Confinement of a worker: what a process gives up before it runs anything that faces a network.

    python -m relay.confine '{"uid": 61184, …}' PROGRAM ARGS…

applies a `Confinement` to itself and then becomes PROGRAM. The order matters: what needs root first (the
network namespace, the view of the file system), then the uid, then what cannot be undone by anyone
(no_new_privs, the parent-death signal). What could not be had is an error, never a silence: the supervisor
asks `possible` beforehand and says in status what is in force.

A directory on the way to Python or to the side's state may be closed to the side's uid (a checkout below
/root, a private temporary directory). The worker then gets a mount namespace of its own in which that
directory is empty but for the very paths it needs, so separation does not depend on where medferry lies.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import stat
import sys
import time
from dataclasses import asdict, dataclass

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_NOSUID = 0x2
MS_NODEV = 0x4
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38

CAP_CHOWN, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN, CAP_SYS_NICE = 0, 6, 7, 21, 23
"""capabilities(7). Root in a container often has the first three and not the others."""

NETNS_DIRECTORY = "/run/netns"
"""Where `ip netns` keeps its namespaces."""

EMPTY_NETNS = ""
"""As `Confinement.netns`: a new network namespace with nothing in it, not even a loopback that is up."""

AUTOGROUP = "/proc/self/autogroup"
"""The priority of the process's session as a whole, where the kernel has it (sched(7), "The autogroup
feature"). It alone counts between sessions there, and each worker is one; a nice value within says only who
goes first of the worker's own threads."""

AUTOGROUP_TRIES = 20
AUTOGROUP_SECONDS = 0.1
"""Without CAP_SYS_ADMIN the kernel takes one change in so many seconds from all processes together."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What to give up. Everything is optional, since without root most of it cannot be had."""

    uid: int | None = None
    """Uid and gid to become, with no supplementary groups."""
    netns: str | None = None
    """Name of a network namespace to enter, `EMPTY_NETNS` for a new empty one, None to stay."""
    paths: tuple[str, ...] = ()
    """Absolute directories that the process needs after it has changed its uid."""
    max_open_files: int = 4096
    nice: int = 0
    """Scheduling priority among all, better below 0: the one thing here that is given, not taken."""
    parent: int | None = None
    """Pid of the supervisor, without which the process must not go on; None: whoever started it."""

    def command(self, program: list[str]) -> list[str]:
        """The command line that confines itself and then becomes `program`."""
        return [sys.executable, "-m", "relay.confine", json.dumps(asdict(self)), *program]

    def describe(self) -> dict[str, bool | str]:
        """What is in force once the process runs, for status: measure to value."""
        netns = {None: "shared", EMPTY_NETNS: "empty"}.get(self.netns, self.netns)
        return {
            "uid": str(self.uid if self.uid is not None else os.getuid()),
            "own uid": self.uid is not None,
            "network namespace": str(netns),
            "no new privileges": True,
            "goes first": self.nice < 0,
            "own view of files": bool(_closed_directories(self.uid, self.paths)),
        }


def _call(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(option: int, value: int) -> None:
    _call(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _call(_libc.mount(*arguments), f"mount {target}")


def enter_netns(name: str) -> None:
    """Move the calling thread into the network namespace that `ip netns` calls `name`. Needs root.

    Raises:
        OSError: There is no such namespace, or no right to enter it.
    """
    fd = os.open(f"{NETNS_DIRECTORY}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call(_libc.setns(fd, CLONE_NEWNET), f"enter network namespace {name}")
    finally:
        os.close(fd)


def go_first(nice: int) -> None:
    """Set the priority of the process, and of its session, where that is its own and sessions have one."""
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    if os.getsid(0) != os.getpid():
        return
    for _ in range(AUTOGROUP_TRIES):
        try:
            with open(AUTOGROUP, "w") as file:
                file.write(str(nice))
        except BlockingIOError:
            time.sleep(AUTOGROUP_SECONDS)
        except OSError as error:
            # No such feature, or it was off when this session began: then the process's own value counts.
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise
            return
        else:
            return
    print("too many processes start at once: this one does not go first", file=sys.stderr)


def _may_pass(uid: int, directory: str) -> bool:
    status = os.stat(directory)
    bit = stat.S_IXUSR if status.st_uid == uid else stat.S_IXGRP if status.st_gid == uid else stat.S_IXOTH
    return bool(status.st_mode & bit)


def _closed_directories(uid: int | None, paths: tuple[str, ...]) -> dict[str, list[str]]:
    """The outermost directories that `uid` may not pass, each with the `paths` that lie below it."""
    closed: dict[str, list[str]] = {}
    if uid is None:
        return closed
    # A symbolic link may lead into a closed directory or lie in one: both names must work.
    for path in dict.fromkeys([*paths, *map(os.path.realpath, paths)]):
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts)):
            parent = "/" + "/".join(parts[:depth])
            if not _may_pass(uid, parent):
                closed.setdefault(parent, []).append(path)
                break
    return closed


def _open_view(closed: dict[str, list[str]]) -> None:
    """Replace each closed directory, for this process alone, by an empty one that holds its paths only."""
    _call(_libc.unshare(CLONE_NEWNS), "unshare mounts")
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    for directory, paths in closed.items():
        kept = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in sorted(set(paths))]
        _mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=64k")
        for path, fd in kept:
            os.makedirs(path, mode=0o755, exist_ok=True)
            _mount(f"/proc/self/fd/{fd}", path, "", MS_BIND | MS_REC)
            os.close(fd)


def apply(confinement: Confinement) -> None:
    """Confine the calling process, for good.

    Raises:
        OSError: A measure could not be had; the process must not go on.
    """
    parent = confinement.parent or os.getppid()
    if confinement.netns == EMPTY_NETNS:
        _call(_libc.unshare(CLONE_NEWNET), "unshare network")
    elif confinement.netns is not None:
        enter_netns(confinement.netns)
    closed = _closed_directories(confinement.uid, confinement.paths)
    if closed:
        _open_view(closed)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = (
        confinement.max_open_files
        if hard == resource.RLIM_INFINITY
        else min(confinement.max_open_files, hard)
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    if confinement.nice:
        go_first(confinement.nice)
    if confinement.uid is not None:
        os.setgroups([])
        os.setresgid(confinement.uid, confinement.uid, confinement.uid)
        os.setresuid(confinement.uid, confinement.uid, confinement.uid)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    # After the change of uid, which clears it. A worker must not outlive the supervisor, which holds the
    # other ends of its sockets.
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the supervisor ended while this worker was starting")


def needed_paths() -> tuple[str, ...]:
    """The directories that Python and medferry's packages are loaded from."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    packages = tuple(os.path.join(package, name) for name in ("relay", "dicom", "rtc"))
    extra = (os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)
    prefixes = (os.path.realpath(sys.base_prefix), os.path.abspath(sys.prefix))
    return (*prefixes, *packages, *filter(os.path.isdir, extra))


def _capabilities() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


def may_go_first() -> bool:
    """Whether this process could give its workers a better priority than others (`Confinement.nice`)."""
    return bool(_capabilities() >> CAP_SYS_NICE & 1)


def possible() -> dict[str, bool]:
    """Which measures this process could impose on its workers."""
    held = _capabilities()
    users = all(held >> number & 1 for number in (CAP_CHOWN, CAP_SETGID, CAP_SETUID))
    admin = bool(held >> CAP_SYS_ADMIN & 1)
    return {
        "own uid": users,
        "network namespace": admin,
        "no new privileges": True,
        "own view of files": admin,
    }


def reachable(uid: int, paths: tuple[str, ...]) -> bool:
    """Whether a process of `uid` would reach all of `paths` without a view of its own."""
    return not _closed_directories(uid, paths)


def main() -> None:
    """Entry of ``python -m relay.confine``."""
    fields = json.loads(sys.argv[1])
    fields["paths"] = tuple(fields["paths"])
    try:
        apply(Confinement(**fields))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"this process cannot be confined and ends: {where}{error.strerror}")
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()

"""What a confined process can no longer do, asked of real processes."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from relay import confine
from relay.confine import (
    AUTOGROUP,
    AUTOGROUP_TRIES,
    EMPTY_NETNS,
    Confinement,
    go_first,
    may_go_first,
    needed_paths,
    possible,
)
from tests.fake_lane.kit import alive, root, until
from tests.peers import require
from tests.product import REPOSITORY

UID = 61_990
"""Of nobody."""


def autogroups() -> bool:
    """Whether this test's session has a priority of its own."""
    try:
        return bool(Path(AUTOGROUP).read_text())
    except FileNotFoundError:
        return False


needs_root = [
    pytest.mark.root,
    pytest.mark.skipif(not root(), reason="needs root: run the tests as root"),
]

ASK = """
import json, os, resource, sys
def status(name):
    lines = open("/proc/self/status").readlines()
    return next(line.split(":", 1)[1].split() for line in lines if line.startswith(name + ":"))
answer = {
    "uids": status("Uid"), "gids": status("Gid"), "groups": status("Groups"),
    "no new privileges": status("NoNewPrivs"), "capabilities": status("CapEff") + status("CapPrm"),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE), "core": resource.getrlimit(resource.RLIMIT_CORE),
    "umask": status("Umask"), "net": os.stat("/proc/self/ns/net").st_ino,
    "mounts": os.stat("/proc/self/ns/mnt").st_ino, "links": os.listdir("/sys/class/net"),
}
for path in sys.argv[1:]:
    try:
        answer[path] = os.listdir(path)
    except OSError as error:
        answer[path] = error.strerror
print(json.dumps(answer))
"""


def confined(
    confinement: Confinement, *arguments: str, script: str = ASK, own_session: bool = False
) -> subprocess.CompletedProcess[str]:
    command = confinement.command([sys.executable, "-I", "-c", script, *arguments])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd="/",
        env=environment,
        start_new_session=own_session,
    )


def answer(confinement: Confinement, *arguments: str) -> dict[str, Any]:
    done = confined(confinement, *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_without_root_too_privileges_files_and_cores_are_limited() -> None:
    seen = answer(Confinement(max_open_files=100))
    assert seen["no new privileges"] == ["1"]
    assert seen["files"] == [100, 100]
    assert seen["core"] == [0, 0]
    assert seen["umask"] == ["0077"]
    assert seen["uids"] == [str(os.getuid())] * 4
    assert seen["net"] == os.stat("/proc/self/ns/net").st_ino
    assert seen["mounts"] == os.stat("/proc/self/ns/mnt").st_ino


def test_a_hard_limit_that_is_lower_already_is_kept() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert answer(Confinement(max_open_files=2**40))["files"] == [hard, hard]


def test_what_cannot_be_had_ends_the_process() -> None:
    done = confined(Confinement(netns="no-such-namespace"))
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("this process cannot be confined and ends: ")


def test_a_supervisor_that_is_gone_already_is_noticed() -> None:
    done = confined(Confinement(parent=os.getppid()))
    assert done.returncode != 0
    assert "the supervisor ended" in done.stderr


@pytest.mark.parametrize("uid", [None, pytest.param(UID, marks=needs_root)])
def test_it_dies_with_its_supervisor(tmp_path: Path, uid: int | None) -> None:
    """Killed like that, the supervisor has no time to end anything."""
    tmp_path.chmod(0o755)
    worker = Confinement(uid=uid, paths=needed_paths()).command(
        [sys.executable, "-I", "-c", "import time, os; print(os.getpid(), flush=True); time.sleep(600)"]
    )
    script = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    supervisor = subprocess.Popen(
        [sys.executable, "-I", "-c", script, *worker],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd="/",
    )
    assert supervisor.stdout is not None
    pid = int(supervisor.stdout.readline())
    assert alive(pid)
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    supervisor.stdout.close()
    until(lambda: not alive(pid), "the worker ends")


@pytest.mark.parametrize(
    ("held", "users", "namespaces"),
    [
        (0x1FFFFFFFFFF, True, True),
        (0xA80425FB, True, False),  # root in a container, as Docker makes it
        (1 << 21, False, True),
        (0, False, False),
    ],
)
def test_what_is_possible_is_what_the_capabilities_allow(
    monkeypatch: pytest.MonkeyPatch, held: int, users: bool, namespaces: bool
) -> None:
    monkeypatch.setattr(confine, "_capabilities", lambda: held)
    assert possible() == {
        "own uid": users,
        "network namespace": namespaces,
        "no new privileges": True,
        "own view of files": namespaces,
    }


@pytest.mark.parametrize(
    ("netns", "shown"), [(None, "shared"), (EMPTY_NETNS, "empty"), ("hospital", "hospital")]
)
def test_describe_says_what_is_in_force(netns: str | None, shown: str) -> None:
    described = Confinement(netns=netns).describe()
    assert described["network namespace"] == shown
    assert described["uid"] == str(os.getuid())
    assert described["own uid"] is False
    assert described["own view of files"] is False


class Kernel:
    """Takes the priority of a session only at the try that it is told to, or answers with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.tries = 0
        self.takes_try = 1
        self.error: int | None = None
        self.path = path
        monkeypatch.setattr(confine, "AUTOGROUP", str(path))
        monkeypatch.setattr(confine, "open", self.open, raising=False)
        monkeypatch.setattr(os, "setpriority", lambda *_: None)
        monkeypatch.setattr(os, "getsid", lambda _: os.getpid())
        monkeypatch.setattr(time, "sleep", lambda _: None)

    def open(self, path: str, mode: str) -> IO[str]:
        self.tries += 1
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        if self.tries < self.takes_try:
            raise BlockingIOError
        return open(path, mode)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    return Kernel(monkeypatch, tmp_path / "autogroup")


@pytest.mark.parametrize("takes_try", [1, AUTOGROUP_TRIES])
def test_a_session_s_priority_is_tried_again_while_others_set_theirs(kernel: Kernel, takes_try: int) -> None:
    kernel.takes_try = takes_try
    go_first(-10)
    assert kernel.path.read_text() == "-10"
    assert kernel.tries == takes_try


def test_who_cannot_set_its_session_s_priority_in_the_end_says_so_and_goes_on(
    kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel.takes_try = AUTOGROUP_TRIES + 1
    go_first(-10)
    assert kernel.tries == AUTOGROUP_TRIES
    assert not kernel.path.exists()
    assert "this one does not go first" in capsys.readouterr().err


@pytest.mark.parametrize("error", [errno.ENOENT, errno.EINVAL])
def test_where_sessions_have_no_priority_the_process_s_own_is_all(kernel: Kernel, error: int) -> None:
    kernel.error = error
    go_first(-10)
    assert kernel.tries == 1


def test_another_refusal_of_the_kernel_is_not_hidden(kernel: Kernel) -> None:
    kernel.error = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        go_first(-10)


@pytest.mark.parametrize(("held", "granted"), [(1 << 23, True), (0xA80425FB, False), (0, False)])
def test_a_better_priority_is_given_where_the_capability_allows(
    monkeypatch: pytest.MonkeyPatch, held: int, granted: bool
) -> None:
    monkeypatch.setattr(confine, "_capabilities", lambda: held)
    assert may_go_first() is granted
    assert Confinement(nice=-10).describe()["goes first"] is True
    assert Confinement().describe()["goes first"] is False


@pytest.mark.root
@pytest.mark.skipif(not root(), reason="needs root: run the tests as root")
class TestAsRoot:
    @pytest.mark.skipif(not may_go_first(), reason="needs CAP_SYS_NICE")
    def test_a_priority_stays_when_the_uid_is_given_up_and_cannot_be_raised(self) -> None:
        script = (
            "import os\nprint(os.getpriority(os.PRIO_PROCESS, 0))\n"
            "try:\n os.setpriority(os.PRIO_PROCESS, 0, -11)\nexcept PermissionError:\n print('no')\n"
        )
        done = confined(Confinement(uid=UID, nice=-10, paths=needed_paths()), script=script)
        assert done.stdout == "-10\nno\n", done.stderr

    @pytest.mark.skipif(not may_go_first(), reason="needs CAP_SYS_NICE")
    @pytest.mark.skipif(not autogroups(), reason="sessions have no priority on this kernel")
    def test_a_session_of_its_own_has_the_priority_too_and_that_of_others_is_left_alone(self) -> None:
        script = f"print(open({AUTOGROUP!r}).read().split()[-1])"
        goes_first = Confinement(uid=UID, nice=-10, paths=needed_paths())
        assert confined(goes_first, script=script, own_session=True).stdout == "-10\n"
        assert confined(goes_first, script=script).stdout == "0\n"

    def test_a_uid_of_its_own_has_no_group_and_no_capability(self) -> None:
        seen = answer(Confinement(uid=UID, paths=needed_paths()))
        assert seen["uids"] == seen["gids"] == [str(UID)] * 4
        assert seen["groups"] == []
        assert {int(word, 16) for word in seen["capabilities"]} == {0}

    def test_a_uid_cannot_be_changed_back(self) -> None:
        script = "import os\ntry:\n os.setuid(0)\nexcept PermissionError:\n print('no')\n"
        assert confined(Confinement(uid=UID, paths=needed_paths()), script=script).stdout == "no\n"

    def test_an_empty_network_namespace_has_a_loopback_that_is_down(self) -> None:
        script = (
            "import socket\nsock = socket.socket()\n"
            "try:\n sock.connect(('127.0.0.1', 9))\nexcept OSError as error:\n print(error.strerror)\n"
        )
        done = confined(Confinement(netns=EMPTY_NETNS), script=script)
        assert done.stdout == "Network is unreachable\n"

    @pytest.fixture
    def netns(self) -> Iterator[str]:
        ip = require("ip")
        name = f"medferry-test-{os.getpid()}-{time.monotonic_ns() % 10**6}"
        subprocess.run([ip, "netns", "add", name], check=True)
        yield name
        subprocess.run([ip, "netns", "delete", name], check=True)

    @pytest.mark.peer
    def test_a_namespace_by_name_is_entered(self, netns: str) -> None:
        seen = answer(Confinement(netns=netns))
        assert seen["net"] == os.stat(f"{confine.NETNS_DIRECTORY}/{netns}").st_ino
        assert seen["net"] != os.stat("/proc/self/ns/net").st_ino

    @pytest.fixture
    def closed(self, tmp_path: Path) -> Path:
        """A directory that other uids may not pass, with one that they need and one that they do not."""
        closed = tmp_path / "closed"
        needed = closed / "inner" / "needed"
        needed.mkdir(parents=True)
        (needed / "file").touch()
        (closed / "secret").mkdir()
        os.chown(needed, UID, UID)
        closed.chmod(0o700)
        return closed

    def test_a_closed_directory_shows_what_is_needed_and_nothing_else(self, closed: Path) -> None:
        needed = str(closed / "inner" / "needed")
        seen = answer(Confinement(uid=UID, paths=(*needed_paths(), needed)), needed, str(closed))
        assert seen[needed] == ["file"]
        assert seen[str(closed)] == ["inner"]
        assert seen["mounts"] != os.stat("/proc/self/ns/mnt").st_ino
        assert sorted(os.listdir(closed)) == ["inner", "secret"], "as before for everybody else"

    def test_a_symbolic_link_into_a_closed_directory_will_do(self, closed: Path, tmp_path: Path) -> None:
        needed = closed / "inner" / "needed"
        link = tmp_path / "link"
        link.symlink_to(needed)
        seen = answer(Confinement(uid=UID, paths=(*needed_paths(), str(link))), str(link))
        assert seen[str(link)] == ["file"]

    def test_a_symbolic_link_in_a_closed_directory_will_do(self, closed: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "file").touch()
        link = closed / "link"
        link.symlink_to(outside)
        seen = answer(Confinement(uid=UID, paths=(*needed_paths(), str(link))), str(link))
        assert seen[str(link)] == ["file"]

    def test_describe_tells_of_a_view_of_its_own(self, closed: Path) -> None:
        needed = str(closed / "inner" / "needed")
        assert Confinement(uid=UID, paths=(needed,)).describe()["own view of files"] is True
        assert Confinement(uid=UID, paths=("/usr/bin",)).describe()["own view of files"] is False

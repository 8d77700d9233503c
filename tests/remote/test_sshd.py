"""Visits over a real ssh server on this machine, with keys made for one test; skipped where there is no sshd.

What needs a slow link or a small disk has the server in network and mount namespaces of its own, where that is permitted.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from remote_parts import SMALL, write_python, write_stub

from bertemd_deploy.errors import MeasurementError
from bertemd_deploy.remote import session, ssh
from bertemd_deploy.remote.session import bench_remote

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))
URL = "ssh://board"
RELAY = Path(__file__).with_name("slow_relay.py")
MEGABYTE = 10**6

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh-keygen") is None,
    reason="there is no sshd on this machine (apt-get install openssh-server)",
)


def make_key(path: Path) -> str:
    """Make a key pair; return the public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)
    return path.with_name(path.name + ".pub").read_text()


class Server:
    """An ssh server on a free port of the loopback address, and the client's configuration for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "temporary"
        self.temporary.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.host_key = make_key(folder / "host_key")
        (folder / "authorized_keys").write_text(make_key(folder / "id"))
        self.trust(self.host_key)
        client = {
            "HostName": "127.0.0.1",
            "Port": self.port,
            "User": getpass.getuser(),
            "IdentityFile": folder / "id",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": folder / "known_hosts",
            "GlobalKnownHostsFile": "/dev/null",
        }
        (folder / "config").write_text("Host board\n" + "".join(f"  {key} {value}\n" for key, value in client.items()))
        self.ssh: tuple[str, ...] = ("ssh", "-F", str(folder / "config"))
        self._process: subprocess.Popen[bytes] | None = None

    def trust(self, key: str) -> None:
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}")

    def start(self, *before: str, namespaces: tuple[str, ...] = (), **environment: str) -> None:
        """Start it, in namespaces of its own after some shell commands; skip the test where that is not permitted."""
        python = write_python(self.folder / "bin")
        given = {
            "PATH": f"{python}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "TMPDIR": str(self.temporary),
        } | environment
        server = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": self.folder / "host_key",
            "AuthorizedKeysFile": self.folder / "authorized_keys",
            "PidFile": "none",
            "UsePAM": "no",
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "SetEnv": " ".join(f"{name}={value}" for name, value in given.items()),
        }
        (self.folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in server.items()))
        log = self.folder / "sshd.log"
        steps = [*before]
        command = ["sh", "-c"]
        if os.getuid() == 0 and not Path("/run/sshd").is_dir():  # where a privileged server insists on an empty folder
            namespaces = (*namespaces, "--mount")
            steps.append("mount -t tmpfs none /run && mkdir /run/sshd")
        if namespaces:
            command = ["unshare", *dict.fromkeys(namespaces), *command]
        steps.append(f"exec {SSHD} -D -f {self.folder / 'sshd_config'} -E {log}")
        self._process = subprocess.Popen([*command, " && ".join(steps)], stderr=subprocess.PIPE)
        until = time.monotonic() + 20
        while not (log.exists() and "Server listening" in log.read_text()):
            if self._process.poll() is not None:
                said = self._process.stderr.read().decode().strip() or log.read_text().strip()
                pytest.skip(f"an ssh server cannot be started as this test needs it ({said})")
            assert time.monotonic() < until, "the ssh server does not listen"
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def inside(self, *command: str) -> str:
        """Run a command in the server's namespaces; return what it says."""
        entered = ["nsenter", f"--target={self.pid}", "--mount", "--net", *command]
        return subprocess.run(entered, capture_output=True, text=True, check=True).stdout

    def cut(self) -> None:
        """End every connection."""
        for process in psutil.Process(self.pid).children(recursive=True):
            if process.name().startswith("sshd"):
                process.kill()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stderr.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(session, "WAITS", (0.2, 0.2))
    found = Server(tmp_path / "device")
    yield found
    found.stop()
    until = time.monotonic() + 10
    while list(found.temporary.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(found.temporary.iterdir()) == []


@pytest.fixture
def stub(monkeypatch):
    """Have a folder sent that only writes a record; returns the function that says what else it does."""
    options = {}
    monkeypatch.setattr(session, "write_runner", lambda artifact, out, **_: write_stub(out, **options))
    return options.update


@pytest.fixture
def visit(artifact_folder, tmp_path, server):
    """Return the function that measures on the server."""

    def go(**options):
        given = {"url": URL, "teacher": None, "out": tmp_path / "out", "settings": SMALL, "ssh": server.ssh}
        return bench_remote(artifact_folder, **(given | options))

    return go


def test_a_device_measures_over_ssh(visit, server, tmp_path):
    server.start()
    settings = replace(SMALL, graphs=("int8",))
    record = visit(url=f"ssh://{getpass.getuser()}@board:{server.port}", settings=settings)
    assert json.loads((tmp_path / "out" / "record.json").read_text()) == record
    assert {entry["graph"] for entry in record["measurements"]} == {"int8"}
    assert sorted(path.name for path in server.folder.iterdir()) == [
        "authorized_keys",
        "bin",
        "config",
        "host_key",
        "host_key.pub",
        "id",
        "id.pub",
        "known_hosts",
        "sshd.log",
        "sshd_config",
        "temporary",
    ]  # fmt: skip - nothing else was left in what is the home folder there


def test_an_unknown_host_key_is_not_accepted(visit, server, stub):
    server.start()
    (server.folder / "known_hosts").write_text("")
    with pytest.raises(
        MeasurementError, match=r"its host key is not among the known hosts, or has changed\. Connect once"
    ):
        visit()
    assert (server.folder / "known_hosts").read_text() == ""
    server.trust(make_key(server.folder / "another_key"))
    with pytest.raises(MeasurementError, match="its host key is not among the known hosts, or has changed"):
        visit()
    for name in ("another_key", "another_key.pub"):
        (server.folder / name).unlink()


def test_a_wrong_key_is_refused(visit, server, stub, tmp_path):
    server.start()
    (server.folder / "authorized_keys").write_text(make_key(tmp_path / "another"))
    with pytest.raises(MeasurementError, match="board cannot be reached: it accepts none of your keys"):
        visit()


def test_nobody_listens(visit, server, stub):
    with pytest.raises(MeasurementError, match=r"board cannot be reached: nothing listens there\. Check the port"):
        visit()


def test_a_cut_connection_is_made_again(visit, server, stub, monkeypatch):
    cuts = []

    def note(line):
        if line == "board: measuring 1/2":
            cuts.append(line)
            server.cut()

    server.start()
    stub(seconds=2)
    monkeypatch.setattr(session, "note", note)
    assert visit()["device"]["kind"] == "remote"
    assert len(cuts) == 1


def test_a_server_that_goes_away_is_told(visit, server, stub, monkeypatch):
    """What is left there is removed by the process that watches over it: here it is told to."""
    warned = []

    def note(line):
        if line == "board: measuring 1/2":
            connections = psutil.Process(server.pid).children(recursive=True)
            server.stop()
            for process in connections:
                process.kill()

    server.start()
    stub(seconds=30)
    monkeypatch.setattr(session, "note", note)
    monkeypatch.setattr(session, "warn", warned.append)
    with pytest.raises(MeasurementError, match="board cannot be reached: nothing listens there"):
        visit()
    assert any("it is removed there by itself 10 minutes after" in line for line in warned)
    (left,) = server.temporary.iterdir()
    (left / "stop").touch()


def test_a_small_disk(visit, server, stub, monkeypatch):
    """A temporary folder of one megabyte: too small before, too small while sending, too small while measuring."""
    server.start(f"mount -t tmpfs -o size=1m none {server.temporary}", namespaces=("--mount",))
    stub(extra=3 * MEGABYTE)
    with pytest.raises(
        MeasurementError, match=r"board: no space in .*/temporary: 1 MB are free, 3 MB are needed\. Free some"
    ):
        visit()
    opening = session.opening
    monkeypatch.setattr(session, "opening", lambda needed: opening(0))
    with pytest.raises(
        MeasurementError, match=r"board: no space in .*/temporary: 0 MB are free, 3 MB are needed\. Free some"
    ):
        visit()

    def write_runner(artifact, out, **_):
        write_stub(out)
        (out / "run.py").write_text("open('big', 'wb').write(bytes(10**7))")
        return out

    monkeypatch.setattr(session, "write_runner", write_runner)
    with pytest.raises(MeasurementError, match=r"board: no space in .*/temporary/bertemd-.*: 0 MB are free"):
        visit()
    assert server.inside("ls", str(server.temporary)) == ""


def netem(server: Server, how: str) -> None:
    """Start the server on a loopback of its own that the kernel makes slow; have ssh go there."""
    link = f"ip link set lo up && tc qdisc add dev lo root netem {how}"
    server.start(link, namespaces=("--net",))
    server.ssh = ("nsenter", f"--net=/proc/{server.pid}/ns/net", *server.ssh)


def relay(server: Server, *, delay: float, rate: float) -> Path:
    """Start the server and have ssh go there by a slow relay; return the file that stalls it."""
    server.start()
    stall = server.folder / "stall"
    command = f"{sys.executable} -S {RELAY} {server.port} {delay} {rate} {stall}"
    server.ssh = (*server.ssh, "-o", f"ProxyCommand={command}")
    return stall


def test_a_slow_link(visit, server, stub):
    """2 ms for every block each way, 2 Mbit a second."""
    relay(server, delay=0.002, rate=250_000)
    stub(extra=MEGABYTE // 4)
    assert visit(ssh=server.ssh)["device"]["kind"] == "remote"


def test_a_lossy_link(visit, server, stub):
    """20 ms each way, 4 Mbit a second, one packet in a hundred lost; where the kernel can do that."""
    netem(server, "delay 20ms rate 4mbit loss 1%")
    stub(extra=MEGABYTE // 4)
    assert visit(ssh=server.ssh)["device"]["kind"] == "remote"
    sent = server.inside("tc", "-s", "qdisc", "show", "dev", "lo").split("Sent ")[1].split()[0]
    assert int(sent) > MEGABYTE // 4


def test_a_link_that_falls_silent(visit, server, stub, monkeypatch):
    """Nothing gets through for a while, and nobody is told: ssh notices, and the measurement goes on meanwhile."""
    stall = relay(server, delay=0, rate=10**8)
    stub(seconds=1)
    monkeypatch.setitem(ssh.OPTIONS, "ServerAliveInterval", "1")
    monkeypatch.setitem(ssh.OPTIONS, "ServerAliveCountMax", "1")
    told: list[str] = []

    def note(line):
        if line == "board: measuring 1/2" and not told:
            told.append(line)
            stall.touch()

    def warn(line):
        told.append(line)
        stall.unlink()

    monkeypatch.setattr(session, "note", note)
    monkeypatch.setattr(session, "warn", warn)
    assert visit(ssh=server.ssh)["device"]["kind"] == "remote"
    assert len(told) == 2
    assert "connection lost while measuring" in told[1]

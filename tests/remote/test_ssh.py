from __future__ import annotations

import pytest

from bertemd_deploy.errors import ArtifactError, MeasurementError, RecipeError
from bertemd_deploy.remote import ssh
from bertemd_deploy.remote.runner.keeper import MARK
from bertemd_deploy.remote.ssh import Address, ConnectionLost, Link, plain

BOARD = Address("board", "pi")


@pytest.mark.parametrize(
    ("url", "expected", "arguments"),
    [
        ("ssh://pi@board", Address("board", "pi"), ["-l", "pi", "--", "board"]),
        ("ssh://board/", Address("board"), ["--", "board"]),
        ("ssh://me_2.x-y@192.168.1.7:2222", Address("192.168.1.7", "me_2.x-y", 2222), None),
        ("ssh://[fe80::1%eth0]:22", Address("fe80::1%eth0", None, 22), ["-p", "22", "--", "fe80::1%eth0"]),
        ("ssh://my_board.local", Address("my_board.local"), ["--", "my_board.local"]),
    ],
)
def test_addresses(url, expected, arguments):
    found = Address.parse(url)
    assert found == expected
    assert f"ssh://{found}" == url.rstrip("/")
    if arguments:
        assert found.arguments() == arguments


@pytest.mark.parametrize(
    "url",
    [
        "board",
        "ssh://",
        "ssh://-oProxyCommand=touch",
        "ssh://-l@board",
        "ssh://pi@-board",
        "ssh://pi@board;reboot",
        "ssh://$(reboot)@board",
        "ssh://pi@bo ard",
        "ssh://pi@board:port",
        "ssh://pi@board:0",
        "ssh://pi@board:65536",
        "ssh://pi@board:22/home",
        "ssh://pi@board\n",
        "ssh://`id`",
        "ssh://pi@[::1",
        "http://board",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(RecipeError, match=r"is no address of a device\. Write ssh://user@host or ssh://user@host:port"):
        Address.parse(url)


def test_a_password_is_not_repeated():
    with pytest.raises(RecipeError) as caught:
        Address.parse("ssh://pi:raspberry@board")
    assert "raspberry" not in str(caught.value)


def answering(device, source: str) -> Link:
    """Return a link to a device whose python3 is a shell script."""
    folder = device.temporary.parent / "script"
    folder.mkdir()
    (folder / "python3").write_text(f"#!/bin/sh\n{source}\n")
    (folder / "python3").chmod(0o755)
    device.python(folder)
    return Link(BOARD, device.ssh)


def test_the_last_answer_counts_and_logs_are_heard(device):
    link = answering(device, f'echo welcome\necho \'{MARK}{{"log": "a"}}\'\necho \'{MARK}{{"b": 1}}\'\necho bye')
    heard = []
    assert link.call(("python3", "x"), heard=heard.append) == {"b": 1}
    assert heard == [{"log": "a"}]


def test_what_is_fed_arrives(device):
    link = answering(device, f"echo '{MARK}{{\"bytes\": '$(wc -c)'}}'")
    assert link.call(("python3", "x"), feed=[b"1" * 100_000, b"2" * 200_000]) == {"bytes": 300_000}


def test_someone_who_listens_shows_that_they_are_there(device, monkeypatch):
    monkeypatch.setattr(ssh, "BEAT_SECONDS", 0.02)
    link = answering(device, f"read line && read line && echo '{MARK}{{\"beats\": 2}}'")
    assert link.call(("python3", "x"), heard=lambda _: None) == {"beats": 2}


def test_a_command_that_does_not_read_is_no_fault(device):
    link = answering(device, f"echo '{MARK}{{}}'; exec <&-")
    assert link.call(("python3", "x"), feed=[b"1" * 10_000_000]) == {}


def test_a_feed_that_fails_is_told(device):
    def feed():
        yield b"1"
        raise ArtifactError("weights.bin: cannot be read")

    link = answering(device, f"cat > /dev/null; echo '{MARK}{{}}'")
    with pytest.raises(ArtifactError, match=r"weights\.bin: cannot be read"):
        link.call(("python3", "x"), feed=feed())


def test_the_users_own_configuration_is_left_alone(device):
    answering(device, f"echo '{MARK}{{}}'").call(("python3", "x"))
    (arguments,) = device.calls
    options = [argument for argument in arguments if argument.startswith("-o")]
    assert "-oBatchMode=yes" in options
    assert "-oServerAliveInterval=15" in options
    assert not any("HostKey" in option or "KnownHosts" in option or "Identity" in option for option in options)
    assert arguments[arguments.index("--") :] == ["--", "board", "python3", "x"]


@pytest.mark.parametrize("word", ["a b", "$(reboot)", "a;b", "", "'", "a\nb", "&", "ä"])
def test_words_that_a_shell_reads_are_refused(word, device):
    with pytest.raises(MeasurementError, match=r"of characters that a shell reads\. Set TMPDIR there"):
        Link(BOARD, device.ssh).call(("python3", f"/tmp/{word}/x" if word else word))
    assert device.calls == []


REASONS = [
    ("Host key verification failed.", "its host key is not among the known hosts, or has changed. Connect once by hand"),
    ("no matching host key type found", "it offers no kind of host key that ssh here accepts"),
    ("pi@board: Permission denied (publickey).", "it accepts none of your keys. Measuring asks for no password: put a key"),
    ("ssh: Could not resolve hostname board", "there is no host of that name"),
    ("ssh: connect to host board port 22: Connection refused", "nothing listens there. Check the port"),
    ("ssh: connect to host board port 22: No route to host", "no way leads there. Check that it is switched on"),
    ("connect to host board port 22: Network is unreachable", "no way leads there"),
    ("ssh: connect to host board port 22: Connection timed out", "it does not answer. Check that it is switched on"),
    ("/home/me/.ssh/config: line 3: Bad configuration option: x", "ssh refuses its configuration"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "meaning"), REASONS)
def test_why_a_device_cannot_be_reached(said, meaning, device):
    device.set(exit=255, stderr=f"banner\n{said}\n")
    with pytest.raises(ConnectionLost) as caught:
        Link(BOARD, device.ssh).call(("python3", "x"))
    assert str(caught.value).startswith("pi@board cannot be reached: ")
    assert meaning in str(caught.value)


def test_another_reason_is_repeated_without_its_colours(device):
    device.set(exit=255, stderr="kex_exchange: \x1b[31mreset\n")
    with pytest.raises(
        ConnectionLost, match=r"the connection ended \(kex_exchange: \?\[31mreset\)\. Try it by hand: ssh -l pi b"
    ):
        Link(BOARD, device.ssh).call(("python3", "x"))
    device.set(exit=255, stderr="")
    with pytest.raises(ConnectionLost, match=r"the connection ended \(ssh said nothing\)"):
        Link(BOARD, device.ssh).call(("python3", "x"))


def test_no_ssh_here():
    with pytest.raises(
        MeasurementError, match=r"^no-such-ssh is not installed on this machine\. Install OpenSSH's client, or"
    ):
        Link(BOARD, ("no-such-ssh",)).call(("python3", "x"))


def test_no_python_there(device):
    device.python(device.temporary)
    device.set(environment={"PATH": str(device.temporary)})
    with pytest.raises(
        MeasurementError, match=r"pi@board: there is no python3\. Install Python 3\.9 or newer there, where a"
    ):
        Link(BOARD, device.ssh).call(("python3", "x"))


def test_a_command_that_fails_is_told(device):
    link = answering(device, "echo MemoryError: >&2; exit 3")
    with pytest.raises(
        MeasurementError, match=r"ended with exit code 3 and without an answer\. Its last line: MemoryError:"
    ):
        link.call(("python3", "x"))


def test_no_answer_is_a_failure(device):
    link = answering(device, "echo welcome")
    with pytest.raises(MeasurementError, match=r"exit code 0 and without an answer\. Its last line: it said nothing"):
        link.call(("python3", "x"))


def test_an_answer_has_a_largest_size(device, monkeypatch):
    monkeypatch.setattr(ssh, "MOST_BYTES", 1000)
    link = answering(device, "while true; do echo noise; done")
    with pytest.raises(MeasurementError, match="it answers with more than 1,000 bytes; refused"):
        link.call(("python3", "x"))


@pytest.mark.parametrize("answer", ["[1]", "{", "nothing", "[" * 900])
def test_an_answer_that_cannot_be_read_is_refused(answer, device):
    link = answering(device, f"echo '{MARK}{answer}'")
    with pytest.raises(MeasurementError, match="pi@board: its answer cannot be read: "):
        link.call(("python3", "x"))


def test_foreign_texts_become_plain():
    assert plain("a\x1b[2Jb\r\n c \x00") == "a?[2Jb?\n c ?"
    assert plain(None) == "None"
    assert len(plain("x" * 1000)) == 300

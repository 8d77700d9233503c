"""Stands in for ssh: runs the command by a shell on this machine, as the device that a state folder describes.

fake_ssh.py STATE [options] -- HOST WORDS...   where STATE/device.json holds "environment", what a session starts with;
"drops", verbs whose next connections are cut; "stderr" and "exit", what to say instead of running anything. Every call's
arguments are appended to STATE/calls, one JSON list a line.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

FORWARDED = 100_000  # bytes of input before a cut
RUNNING = 0.4  # seconds of output before a cut


def main() -> int:
    state = Path(sys.argv[1])
    words = sys.argv[sys.argv.index("--") + 2 :]
    with (state / "calls").open("a") as calls:
        calls.write(json.dumps(sys.argv[2:]) + "\n")
    device = json.loads((state / "device.json").read_text())
    if "exit" in device:
        sys.stderr.write(device["stderr"])
        return int(device["exit"])
    drops = device.get("drops", [])
    cut = len(words) > 2 and words[2] in drops
    command = ["/bin/sh", "-c", " ".join(words)]
    if not cut:
        return subprocess.run(command, env=device["environment"], check=False).returncode
    drops.remove(words[2])
    (state / "device.json").write_text(json.dumps(device))
    with subprocess.Popen(command, env=device["environment"], stdin=subprocess.PIPE) as process:
        if words[2] == "receive":
            process.stdin.write(sys.stdin.buffer.read(FORWARDED))
            process.stdin.flush()
        else:
            time.sleep(RUNNING)
        process.kill()
    sys.stderr.write("client_loop: send disconnect: Broken pipe\n")
    return 255


if __name__ == "__main__":
    sys.exit(main())

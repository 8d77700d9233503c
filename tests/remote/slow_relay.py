"""A slow way to a port of this machine, for ssh's ProxyCommand: slow_relay.py PORT DELAY RATE STALL

Every block waits for DELAY seconds and passes at RATE bytes a second; while the file STALL is there, nothing passes at all.
"""

import os
import socket
import sys
import threading
import time
from pathlib import Path

BLOCK = 4096


def pump(source: int, target: int, delay: float, rate: float, stall: Path) -> None:
    while block := os.read(source, BLOCK):
        time.sleep(delay + len(block) / rate)
        while stall.exists():
            time.sleep(0.02)
        while block:
            block = block[os.write(target, block) :]
    os._exit(0)


def main() -> None:
    port, delay, rate, stall = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        there = connection.fileno()
        threading.Thread(target=pump, args=(0, there, delay, rate, stall), daemon=True).start()
        pump(there, 1, delay, rate, stall)


if __name__ == "__main__":
    main()

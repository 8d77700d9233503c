"""How much memory a process took at most, and how many bytes a model is on disk.

On Linux memory is read from /proc/self/status, the peak as VmHWM. `getrusage` is used elsewhere: on Linux its value also
covers the moment before exec, when a new process still shares the memory of the one that started it, so a worker of a
large parent would be charged with the parent's size.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bertemd_deploy.errors import ModelError

PROC_STATUS = Path("/proc/self/status")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def peak_in_status(text: str) -> int | None:
    """Return the peak resident bytes that the text of /proc/<pid>/status states, or None."""
    return _in_status(text, "VmHWM")


def _in_status(text: str, field: str) -> int | None:
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _own_status(field: str) -> int | None:
    try:
        return _in_status(PROC_STATUS.read_text(), field)
    except OSError:
        return None


def peak_rss_bytes() -> int | None:
    """Return the most resident memory this process has had, in bytes, or None where the system does not tell."""
    peak = _own_status("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def rss_bytes() -> int:
    """Return the resident memory of this process now, in bytes."""
    now = _own_status("VmRSS")
    if now is not None:
        return now
    import psutil

    return int(psutil.Process().memory_info().rss)


def graph_bytes(path: Path) -> int:
    """Return the size of an ONNX file with its external weights (`<name>.data`, `<name>_data`), in bytes."""
    parts = [path, path.with_name(path.name + ".data"), path.with_name(path.name + "_data")]
    return sum(part.stat().st_size for part in parts if part.is_file())


def weight_bytes(folder: Path) -> int:
    """Return the size of a Hugging Face folder's weights, in bytes.

    Raises:
        ModelError: the folder holds none of the known weight files, whole or in shards.
    """
    for name in WEIGHT_FILES:
        stem, suffix = name.split(".")
        parts = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))
        if parts:
            return sum(part.stat().st_size for part in parts)
    raise ModelError(f"{folder}: holds no weights ({' or '.join(WEIGHT_FILES)}). Name the folder of a trained model.")

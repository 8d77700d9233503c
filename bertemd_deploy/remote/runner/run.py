"""Measure the student beside this file on this machine: python3 run.py [--out record.json] [--quick] [--force]."""

import sys

OLDEST = (3, 9)

if __name__ == "__main__":
    if sys.version_info < OLDEST:  # any Python 3 has to get this far
        sys.exit(
            "error: this is Python "
            + ".".join(map(str, sys.version_info[:2]))
            + "; measuring needs Python 3.9 or newer. Start run.py with a newer one, as in: python3.11 run.py"
        )
    import prepare  # type: ignore[import-not-found]  # beside this file, on the device

    sys.exit(prepare.main())

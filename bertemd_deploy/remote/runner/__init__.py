"""What runs on the device: copied into the runner folder by `remote.folder`, and imported from there alone.

Everything here is written for Python 3.9 (`run.py` for any Python, to say what it needs) and its standard library.
"""

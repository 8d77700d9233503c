"""Modules that take the place of a package which a device lacks and cannot install."""

"""Measuring on another machine: a folder that measures by itself, carried there by hand or over ssh."""

"""Errors a user can act on, each with the exit code the command line ends with.

A message holds: where, what was found, what was allowed, what to do next. `cli.main` prints it and exits; anything that is
not a `BertemdError` is our own mistake (exit 1, traceback).
"""

from __future__ import annotations


class BertemdError(Exception):
    """Base of every failure whose cause the user can see and mend; exit code 3 unless a child says otherwise."""

    exit_code = 3


class RecipeError(BertemdError):
    """A recipe, option or combination of options is not usable (exit 2)."""

    exit_code = 2


class DataError(BertemdError):
    """A data set is missing, malformed, or does not fit the task."""


class ModelError(BertemdError):
    """A model folder is missing, incomplete, unsafe to load, or does not fit the data or its partner."""


class EmdError(BertemdError):
    """A cost, marginal or flow is not usable: not finite, of unequal mass, or short of the optimum."""


class TrainingError(BertemdError):
    """Training cannot go on, such as after a loss that is not finite."""


class UnfinishedError(BertemdError):
    """A run stopped where it was told to, before its end; the same command continues it."""


class ArtifactError(BertemdError):
    """An artifact, run folder or record is missing, damaged, of another version, or in the way."""


class ExportError(BertemdError):
    """A graph could not be exported, fused or quantized."""


class GateError(BertemdError):
    """A measured bar was missed: parity, accuracy or speed (exit 4)."""

    exit_code = 4


class BudgetError(GateError):
    """A student needs more, or keeps less, than its budget on a device allows, or is worse than its baseline (exit 4)."""


class MeasurementError(BertemdError):
    """A measurement could not be taken, such as when a worker process died."""


class NoisyError(MeasurementError):
    """A measurement was disturbed where a quiet one was asked for; its record is written."""


class MemoryLimitError(MeasurementError):
    """A model does not fit into the memory it was given: a result for the one who asked, who may go on with others.

    Attributes:
        limit_bytes: what it was given.
        peak_bytes: the most it is known to have had, in bytes; None where the system does not tell.
    """

    def __init__(self, message: str, *, limit_bytes: int, peak_bytes: int | None) -> None:
        """Take the message and both amounts."""
        super().__init__(message)
        self.limit_bytes, self.peak_bytes = limit_bytes, peak_bytes


def missing_extra(extra: str, *, package: str) -> BertemdError:
    """Return the error for a command whose optional packages are not installed.

    Args:
        extra: name of the extra that brings `package`.
        package: the import that failed.
    """
    return BertemdError(
        f"this needs the '{extra}' extra ({package} is not installed). "
        f"Install it with: pip install 'bertemd-deploy[{extra}]'"
    )

"""Every refusal of precimap, as one tree.

    PrecimapError
    |-- InputError              what the user gave is wrong (the command line exits with 2)
    |   |-- TaskError           a task file, a forward, a metric, a split
    |   |-- DataError           a log file that cannot be read as described
    |   |-- ModelError          a model that cannot be looked into, or holds NaN
    |   |-- SchemeError         an unknown scheme, or one that a layer cannot take
    |   |-- MapError            a precision map that cannot be read
    |   |   `-- PremiseMismatch a map of another model, task or data
    |   |-- ProfileError        a hardware profile that cannot be read, or lacks what is asked of it
    |   |-- DeployError         a map that this target cannot run
    |   |-- MissingExtra        a library of an extra that is not installed (an ImportError, too)
    |   `-- SaveError           a file that could not be written (the old one is still there)
    |-- AlphaSpent              the certify split has no confidence left for another map
    `-- JournalError            a run directory of another premise, or in use

and three warnings:

    UserWarning
    |-- BatchSizeWarning        a deployed model serves batches that its times do not speak of
    |-- EmulatedWarning         a model is deployed that computes as measured, slowly
    `-- UncertifiedMapWarning   a map is deployed of which nothing is proved

Each message says what was expected, what came, and what to do. A "no" of the statistics is not an error: it is a
`Certificate` whose verdict says so.
"""


class PrecimapError(Exception):
    """Base of everything that precimap raises on purpose."""


class InputError(PrecimapError):
    """What the user gave is wrong; nothing was changed."""


class TaskError(InputError):
    """A task file, forward, loss, metric or split that cannot be used."""


class DataError(InputError):
    """A log file, or its description, that cannot be read; names file, line and column."""


class ModelError(InputError):
    """A model that precimap cannot look into, or whose weights are not finite."""


class SchemeError(InputError):
    """An unknown scheme, or one that the named layer cannot take."""


class MapError(InputError):
    """A precision map that cannot be read, or that does not fit the model."""


class PremiseMismatch(MapError):
    """A precision map made for other weights, another task or other data."""


class ProfileError(InputError):
    """A hardware profile that cannot be read, or that holds no time of what is asked."""


class DeployError(InputError):
    """A map that the chosen target cannot run as it stands."""


class MissingExtra(InputError, ImportError):
    """A library that an extra brings is not installed; the message names the extra."""


class SaveError(InputError):
    """A file that could not be written; what was there before is still there."""


class AlphaSpent(PrecimapError):
    """The certify split has no confidence left: it has judged other maps before."""


class JournalError(PrecimapError):
    """A run directory that belongs to another premise or to another process."""


# What a call into a model, or into torch on one layer of it, raises when it cannot be done: an answer about that call, where
# it can be done without it. Neither an interrupt nor a process that is out of memory.
FAILURES = (
    PrecimapError,
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)


def first_line(error: BaseException, longest: int = 200) -> str:
    """What an error says, as a part of a sentence."""
    lines = str(error).splitlines()
    return lines[0][:longest] if lines else type(error).__name__


class BatchSizeWarning(UserWarning):
    """A deployed model is given batches outside the sizes that its map was timed with."""


class EmulatedWarning(UserWarning):
    """A model is deployed for the target `emulated`, which is exact and slower than the model that was given."""


class UncertifiedMapWarning(UserWarning):
    """A map is deployed that has no certificate, one that says no, or that of another map."""

"""Which column of a file is what.

Invariant: columns are found by name; a file without a header gets its names here, and every line must have as many
fields as there are names. Guessing types or roles from the first rows was not taken: a wrong guess shows as a bad model.
"""

from dataclasses import dataclass

from precimap.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The roles of the columns; those not named are not read.

    label: a number. dense: numbers, may be missing. categorical: texts or integers, may be missing. user: texts or
    integers. time: numbers, timestamps, or texts such as 2026-03-31T12:00:00. header: the names of all columns, in order,
    for a text file whose first line is data already. missing: the fields of a text file that stand for no value.
    Raises DataError for a name that is not in `header`, or is given twice.
    """

    label: str
    dense: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    user: str | None = None
    time: str | None = None
    header: tuple[str, ...] | None = None
    missing: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        given = (self.label, *self.dense, *self.categorical)
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            raise DataError(f"expected each column once, got {', '.join(twice)} more than once")
        unknown = [name for name in self.needed if self.header is not None and name not in self.header]
        if unknown:
            raise DataError(f"expected columns out of the header given, got {', '.join(unknown)}")

    @property
    def needed(self) -> tuple[str, ...]:
        """All columns that are read, each once: a user may be a categorical column too."""
        own = (self.label, *self.dense, *self.categorical, self.user, self.time)
        return tuple(dict.fromkeys(name for name in own if name is not None))


_INTEGERS = tuple(f"I{number}" for number in range(1, 14))
_CATEGORIES = tuple(f"C{number}" for number in range(1, 27))

# Criteo's click logs (Display Advertising Challenge, 2014, readme.txt; the Terabyte logs are the same): tab-separated, no
# header, label, 13 integers (counts), 26 hashed values of 32 bits in hexadecimal, empty where missing, rows in the order
# of time. They name neither user nor time: `dataclasses.replace(CRITEO, header=(*CRITEO.header, "user", "time"), ...)`.
CRITEO = Columns(label="label", dense=_INTEGERS, categorical=_CATEGORIES, header=("label", *_INTEGERS, *_CATEGORIES))

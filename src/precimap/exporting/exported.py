"""What an export says of itself: `export.json` in its folder, and what the command prints.

Invariant: everything that was measured stands there with its n, and what was not measured is named. A caveat is a whole
sentence.
"""

from pathlib import Path

from pydantic import Field, ValidationError

from precimap.certificate import Record
from precimap.durable import write_text
from precimap.errors import MapError

RECORD = "export.json"


class Difference(Record):
    """Outputs of what was exported against those of the model that the certificate is of, on `units` units of `batches`
    batches.

    quantising: root mean square change of the outputs by the map itself, against the original model; what `rms` is held
    against.
    """

    against: str
    rms: float = Field(ge=0)
    largest: float = Field(ge=0)
    largest_output: float = Field(ge=0)
    quantising: float = Field(ge=0)
    units: int = Field(ge=1)
    batches: int = Field(ge=1)


class Served(Record):
    """What one engine made of the files, on the machine of the export.

    layers: each layer in low precision that the engine multiplies -> what its products run in there, which is not always
    what the file asks for. refused: why it must not serve the files.
    """

    engine: str
    version: str
    layers: dict[str, str]
    difference: Difference | None
    refused: str | None


class Exported(Record):
    """One exported map.

    to: the target's name. map: the fingerprint of the map. not_certified: None, or why the map is not.
    layers: each layer of the map -> what computes it in these files. inputs: what may vary in them. engine: versions that
    made and checked the files. notes: what whoever serves them has to know. served: engines that ran the files here.
    """

    version: int = 1
    to: str
    map: str
    not_certified: str | None
    files: tuple[str, ...]
    layers: dict[str, str]
    inputs: tuple[str, ...]
    difference: Difference | None
    engine: dict[str, str]
    notes: tuple[str, ...]
    served: tuple[Served, ...] = ()

    def save(self, folder: Path) -> None:
        """Write it into the folder. Raises SaveError."""
        write_text(folder / RECORD, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Exported":
        """Read it. Raises MapError for a folder that holds none."""
        path = Path(folder) / RECORD
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise MapError(
                f"{folder}: expected a folder that precimap export wrote, with {RECORD} ({error})"
            ) from error

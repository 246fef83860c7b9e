"""PrecisionMap: layer -> scheme, total, with its evidence, its premise and its certificate.

Invariant: a map names every layer of the model, also those kept at base precision, each with its verdict and reason; and
it says what it was made from, so that using it elsewhere raises. It is the only thing that passes from choosing to
running. A list of exceptions to a default (as `ignore` lists are) was not taken: a layer nobody looked at would run in
low precision unseen. JSON, validated by pydantic; `docs/precision_map.schema.json` is its schema.
"""

import hashlib
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from precimap.certificate import Certificate, Record, Rounding
from precimap.durable import write_text
from precimap.end_to_end import EndToEnd
from precimap.errors import MapError, PremiseMismatch, SchemeError
from precimap.numerics.schemes import Scheme, scheme_from_row

MAP_VERSION = 1
LARGEST_FILE = 256 * 2**20  # a map of 100,000 layers is about 50 MB


class Verdict(StrEnum):
    """Why a layer has the precision it has."""

    TOLERANT = "tolerant"  # its own drop is below the cutoff
    SENSITIVE = "sensitive"  # its own drop is above the cutoff
    SLOWER = "slower"  # low precision saves no time there
    INELIGIBLE = "ineligible"  # it cannot take any of the schemes
    PINNED = "pinned"  # the user keeps it
    UNDECIDED = "undecided"  # its own drop cannot be told from the cutoff at this sample size


class Evidence(Record):
    """One layer alone under one scheme, on (a part of) the search split: drop, standard error, one-sided bounds."""

    drop: float
    error: float
    lower: float | None
    upper: float | None
    n: int = Field(ge=1)
    clusters: int = Field(ge=1)
    changed: int = Field(ge=0)


class Decision(Record):
    """What one layer does. `scheme` None means base precision; the input range belongs to static schemes.

    `contracted` are the dims of the weight that its ops sum over, None where they differ: with the shape, all that
    is needed to make the layer's codes again without looking at a batch. `evidence` was measured by a direct probe,
    `predicted` by the screen: by scheme, either or both may lack one.
    """

    scheme: str | None
    verdict: Verdict
    reason: str
    shape: tuple[int, ...]
    ops: tuple[str, ...]
    contracted: tuple[int, ...] | None
    input_scale: float | None = Field(default=None, gt=0)
    input_zero: int | None = None
    evidence: dict[str, Evidence] = Field(default_factory=dict)
    predicted: dict[str, Evidence] = Field(default_factory=dict)
    flops_share: float = Field(default=0.0, ge=0, le=1)
    bytes: int = Field(default=0, ge=0, lt=2**63)


class Premise(Record):
    """What a map was made from."""

    weights: str
    task: str
    metric: str
    calibration: str
    search: str
    certify: str
    base_precision: str
    device: str
    precimap: str
    torch: str


class UnitSketch(Record):
    """By which the units that chose a map are known again: how many there are, and the smallest of their prints.

    prints: base64 of uint64, ascending, see `precimap.search.certificate.known_units`.
    """

    n: int = Field(ge=0)
    prints: str


class Realignment(Record):
    """A scale and a shift of each output of `layer`, the nn.Linear that makes the scores, to be folded into it.

    Fitted without labels on the n logits of each output on the calibration split, so that scale * quantised + shift
    gives the probabilities of the baseline as nearly as it can.
    """

    layer: str
    scale: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    shift: tuple[float, ...]
    n: int = Field(ge=1)

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if len(self.shift) != len(self.scale):
            raise ValueError(f"expected as many shifts as scales, {len(self.scale)}, got {len(self.shift)}")
        return self

    def __str__(self) -> str:
        return ", ".join(f"x {scale:.5f} {shift:+.5f}" for scale, shift in zip(self.scale, self.shift, strict=True))


class PrecisionMap(Record):
    """Layer -> scheme for one model. Make it with `precimap.search`, read it with `PrecisionMap.load`."""

    version: int = MAP_VERSION
    target: str
    schemes: dict[str, dict[str, Any]]
    layers: dict[str, Decision]
    premise: Premise
    certificate: Certificate | None = None
    rounding: Rounding | None = None
    realignment: Realignment | None = None
    end_to_end: EndToEnd | None = None
    chosen_on: tuple[UnitSketch, ...] = ()

    @model_validator(mode="after")
    def _schemes_fit(self) -> Self:
        if self.version != MAP_VERSION:
            raise ValueError(f"expected version {MAP_VERSION}, got {self.version}")
        try:
            known = {name: scheme_from_row(name, row) for name, row in self.schemes.items()}
        except SchemeError as error:
            raise ValueError(str(error)) from error
        for name, decision in self.layers.items():
            if decision.scheme is None:
                continue
            if decision.scheme not in known:
                raise ValueError(f"layer {name}: scheme {decision.scheme!r} is not among the map's schemes")
            if known[decision.scheme].needs_calibration and decision.input_scale is None:
                raise ValueError(f"layer {name}: scheme {decision.scheme} needs an input_scale")
        return self

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of a layer, None for base precision. Raises KeyError for a layer that is not in the map."""
        chosen = self.layers[name].scheme
        return None if chosen is None else scheme_from_row(chosen, self.schemes[chosen])

    @property
    def low(self) -> tuple[str, ...]:
        """The layers in low precision."""
        return tuple(name for name, decision in self.layers.items() if decision.scheme is not None)

    @property
    def flops_share(self) -> float:
        """Share of the model's weight FLOPs whose product runs in low precision (weight-only schemes do not count)."""
        return sum(d.flops_share for name, d in self.layers.items() if (s := self.scheme_of(name)) and s.computes_low)

    @property
    def bytes_before(self) -> int:
        """Of all layers in base precision."""
        return sum(decision.bytes for decision in self.layers.values())

    @property
    def bytes_after(self) -> int:
        """Of all layers under the map, scales and offsets included."""
        return sum(
            decision.bytes
            if (scheme := self.scheme_of(name)) is None
            else scheme.stored_bytes(decision.shape, decision.contracted)
            for name, decision in self.layers.items()
        )

    @property
    def bytes_share(self) -> float:
        """Share of the layers' bytes that a map puts in low precision, counted in base precision; 0 without any."""
        return sum(self.layers[name].bytes for name in self.low) / self.bytes_before if self.bytes_before else 0.0

    @property
    def fingerprint(self) -> str:
        """Of what runs: weights, target, schemes, static ranges, realignment. Evidence and certificate do not enter."""
        running = {
            name: (d.scheme, self.schemes[d.scheme], d.input_scale, d.input_zero)
            for name, d in sorted(self.layers.items())
            if d.scheme is not None
        }
        repaired = [] if self.realignment is None else [self.realignment.model_dump(exclude={"n"})]
        text = json.dumps([self.premise.weights, self.target, running, *repaired], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the map as JSON; on any failure what was there before survives. Raises SaveError."""
        write_text(Path(path), self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "PrecisionMap":
        """Read a map. Raises MapError that names the first thing which is wrong with the file."""
        path = Path(path)
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise MapError(f"{path}: larger than {LARGEST_FILE >> 20} MB; this is not a precision map")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise MapError(f"{path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise MapError(f"{path}: expected a JSON text, got bytes that are not UTF-8") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str = "map") -> "PrecisionMap":
        """Read a map from its JSON text; `name` is how the messages call it. Raises MapError."""
        try:
            # Read twice: pydantic keeps the last of two equal keys, which would hide one of two decisions on a layer.
            json.loads(text, object_pairs_hook=_no_duplicates)
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise MapError(f"{name}: not a precision map of version {MAP_VERSION}: {where}: {first['msg']}") from error
        except (ValueError, RecursionError) as error:
            raise MapError(
                f"{name}: expected a precision map in JSON, got something else or a part of one ({error})"
            ) from error

    def check(self, **now: str) -> None:
        """Compare fields of the premise (weights=..., search=..., ...) with what they are now.

        Raises PremiseMismatch that names each difference.
        """
        differing = [
            f"{field}: the map was made for {getattr(self.premise, field)}, this is {value}"
            for field, value in now.items()
            if getattr(self.premise, field) != value
        ]
        if differing:
            raise PremiseMismatch(f"the map does not belong here; {'; '.join(differing)}. Search again for this one.")

    def diff(self, other: "PrecisionMap") -> tuple[str, ...]:
        """What `other` does differently, a line each; empty when both run the same."""
        lines = []
        for name in dict.fromkeys((*self.layers, *other.layers)):
            before, after = self.layers.get(name), other.layers.get(name)
            if _running(before, self) != _running(after, other):
                lines.append(f"{name}: {_said(before)} -> {_said(after)}")
        if self.realignment != other.realignment:
            lines.append(f"realignment: {_repair(self.realignment)} -> {_repair(other.realignment)}")
        if self.target != other.target:
            lines.append(f"target: {self.target} -> {other.target}")
        for field in Premise.model_fields:
            if getattr(self.premise, field) != getattr(other.premise, field):
                lines.append(f"premise {field}: {getattr(self.premise, field)} -> {getattr(other.premise, field)}")
        return tuple(lines)


def _running(decision: Decision | None, of: PrecisionMap) -> object:
    if decision is None or decision.scheme is None:
        return None if decision is None else "base precision"
    return (decision.scheme, json.dumps(of.schemes[decision.scheme]), decision.input_scale, decision.input_zero)


def _said(decision: Decision | None) -> str:
    if decision is None:
        return "not in the map"
    if decision.scheme is None:
        return "base precision"
    return (
        decision.scheme if decision.input_scale is None else f"{decision.scheme} (input scale {decision.input_scale:g})"
    )


def _repair(realignment: Realignment | None) -> str:
    return "none" if realignment is None else str(realignment)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise MapError(f"the key {twice!r} stands twice; a map names each layer once")
    return row

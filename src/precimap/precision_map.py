"""PrecisionMap: layer -> scheme, total, with its evidence, its premise and its certificate.

Invariant: a map names every layer of the model, also those kept at base precision, each with its verdict and reason; and
it says what it was made from, so that using it elsewhere raises. It is the only thing that passes from choosing to
running. A file carries a digest of all it says, and a certificate the fingerprint of what it is about: a file that was
edited or damaged does not load (`docs/trust.md` says against what that helps, and against whom not). A list of exceptions
to a default (as `ignore` lists are) was not taken: a layer nobody looked at would run in low precision unseen. JSON,
validated by pydantic; `docs/precision_map.schema.json` is its schema.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import (
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from precimap.certificate import Certificate, Record, Rounding
from precimap.decisions import Cast, Decision, Evidence, OfModel, Premise, Realignment, UnitSketch, Verdict
from precimap.durable import write_text
from precimap.end_to_end import EndToEnd
from precimap.errors import MapError, PremiseMismatch, SchemeError
from precimap.map_text import digest_of, without_duplicates
from precimap.numerics.schemes import Scheme, scheme_from_row

__all__ = ["Decision", "Evidence", "OfModel", "PrecisionMap", "Premise", "Realignment", "Verdict"]

MAP_VERSION = 2  # 1 had no digest
_WHAT_TO_DO = (
    "take the map as it was written; or, to use one of your own, delete certificate, rounding, end_to_end and digest and "
    "certify it (precimap certify)"
)
_LOW_VERDICTS = (Verdict.TOLERANT, Verdict.UNDECIDED)  # of layers that a search puts in low precision
BYTES = {"float32": 4, "float64": 8}  # of a value, in a precision that a cast shortens
LARGEST_FILE = 256 * 2**20  # a map of 100,000 layers is about 50 MB


class PrecisionMap(Record):
    """Layer -> scheme for one model. Make it with `precimap.search`, read it with `PrecisionMap.load`.

    digest: SHA-256 of everything else, in the file alone, made when it is written and compared when it is read. A map that
    was made by hand needs none, as long as it claims nothing (`claims`). cast: the dtype of all that has no scheme.
    """

    version: int = MAP_VERSION
    target: str
    schemes: dict[str, dict[str, Any]]
    layers: dict[str, Decision]
    premise: Premise
    certificate: Certificate | None = None
    rounding: Rounding | None = None
    realignment: Realignment | None = None
    cast: Cast | None = None
    end_to_end: EndToEnd | None = None
    chosen_on: tuple[UnitSketch, ...] = ()
    of_model: OfModel | None = None
    digest: str | None = None

    @model_validator(mode="after")
    def _schemes_fit(self) -> Self:
        if self.version != MAP_VERSION:
            raise ValueError(
                f"expected version {MAP_VERSION}, got {self.version}; make the map again with this precimap"
            )
        try:
            known = {name: scheme_from_row(name, row) for name, row in self.schemes.items()}
        except SchemeError as error:
            raise ValueError(str(error)) from error
        if self.cast is not None and self.premise.base_precision not in BYTES:
            raise ValueError(f"it casts a model of {self.premise.base_precision}; expected one of {' or '.join(BYTES)}")
        for name, decision in self.layers.items():
            if decision.scheme is None:
                continue
            if decision.scheme not in known:
                raise ValueError(f"layer {name}: scheme {decision.scheme!r} is not among the map's schemes")
            if known[decision.scheme].needs_calibration and decision.input_scale is None:
                raise ValueError(f"layer {name}: scheme {decision.scheme} needs an input_scale")
        return self

    @model_validator(mode="after")
    def _is_as_it_was_written(self, info: ValidationInfo) -> Self:
        given = self.digest
        object.__setattr__(self, "digest", None)  # of the file: this value may be changed by model_copy
        if info.mode == "json" and given is None and self.claims:
            raise ValueError(f"it has {' and '.join(self.claims)} and no digest; {_WHAT_TO_DO}")
        if given is not None and given != self.model_dump(mode="json")["digest"]:
            raise ValueError(f"its digest is of another content: the file was edited or damaged; {_WHAT_TO_DO}")
        for contradiction in self.contradictions():
            raise ValueError(f"{contradiction}; {_WHAT_TO_DO}")
        return self

    @model_serializer(mode="wrap")
    def _with_digest(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        row: dict[str, Any] = written(self)
        for later in ("of_model", "cast"):  # maps that were written before there was one have another digest with it
            if getattr(self, later) is None:
                row.pop(later, None)
        if "digest" in row:
            row["digest"] = digest_of({name: value for name, value in row.items() if name != "digest"})
        return row

    def __repr__(self) -> str:
        said = "not certified" if self.not_certified else "certified"
        whole = "" if self.cast is None else f"the model in {self.cast}, "
        low = f"{len(self.low)} of {len(self.layers)} layers in low precision"
        return f"PrecisionMap({self.target}, {whole}{low}, {said})"

    __str__ = __repr__

    @property
    def claims(self) -> tuple[str, ...]:
        """What the map says of itself that somebody measured."""
        return tuple(name for name in ("certificate", "rounding", "end_to_end") if getattr(self, name) is not None)

    def contradictions(self) -> Iterator[str]:
        """What its parts say against each other, a sentence each; of a map that a search made, nothing."""
        found = self.certificate
        if found is not None and found.map != self.fingerprint:
            yield f"its certificate is of another map ({found.map}) than this one ({self.fingerprint})"
        if found is not None and found.metric != self.premise.metric:
            yield f"its certificate is in {found.metric}, and the map was made for {self.premise.metric}"
        if found is not None and found.unrepaired is not None and self.realignment is None:
            yield "its certificate speaks of a realigned last logit, and the map has none"
        if self.of_model is not None and self.of_model.bytes < self.bytes_before:
            yield f"its layers have {self.bytes_before:,} bytes, and all parameters of the model {self.of_model.bytes:,}"
        if self.end_to_end is not None and self.end_to_end.map != self.fingerprint:
            yield f"its times are of another map ({self.end_to_end.map}) than this one ({self.fingerprint})"
        if self.claims:
            for name, decision in self.layers.items():
                if decision.scheme is not None and decision.verdict not in _LOW_VERDICTS:
                    yield f"layer {name} is {decision.verdict.value}, and in {decision.scheme}"

    @property
    def not_certified(self) -> str | None:
        """Why nothing is proved of the map as it stands, or None for a certified one."""
        if self.certificate is None:
            return "it has no certificate"
        if self.certificate.map != self.fingerprint:
            return "its certificate is of another map"
        return None if self.certificate.certified else f"its certificate says {self.certificate.verdict!r}"

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of a layer, None for base precision. Raises KeyError for a layer that is not in the map."""
        chosen = self.layers[name].scheme
        return None if chosen is None else scheme_from_row(chosen, self.schemes[chosen])

    @property
    def low(self) -> tuple[str, ...]:
        """The layers in low precision."""
        return tuple(name for name, decision in self.layers.items() if decision.scheme is not None)

    @property
    def changes(self) -> bool:
        """Whether anything is in low precision: a layer, or the model as a whole."""
        return bool(self.low) or self.cast is not None

    def share_of(self, name: str) -> float:
        """A layer's share of the model's FLOPs."""
        return self.layers[name].flops_share * (1.0 if self.of_model is None else self.of_model.weights_share)

    @property
    def flops_share(self) -> float:
        """Share of the model's FLOPs whose product runs in low precision (weight-only schemes do not count)."""
        return sum(self.share_of(name) for name in self.layers if (s := self.scheme_of(name)) and s.computes_low)

    @property
    def flops_said(self) -> str:
        """`flops_share` in words; a map that does not know all FLOPs says of which it speaks."""
        return f"{self.flops_share:.1%} of the {'weight ' if self.of_model is None else ''}FLOPs"

    @property
    def bytes_before(self) -> int:
        """Of all layers in base precision."""
        return sum(decision.bytes for decision in self.layers.values())

    @property
    def bytes_after(self) -> int:
        """Of all layers under the map, scales, offsets and parameters that stay beside their codes included."""
        return sum(
            self._kept(decision.bytes)
            if (scheme := self.scheme_of(name)) is None
            else scheme.stored_bytes(decision.shape, decision.contracted)
            + (self._kept(decision.bytes) if decision.keeps(scheme) else 0)
            for name, decision in self.layers.items()
        )

    @property
    def other_bytes(self) -> int:
        """Of the parameters that are in no layer; 0 where the map does not know."""
        return 0 if self.of_model is None else self.of_model.bytes - self.bytes_before

    @property
    def shrinks(self) -> tuple[int, int]:
        """Bytes of all parameters before and after, as far as the map knows them."""
        return self.bytes_before + self.other_bytes, self.bytes_after + self._kept(self.other_bytes)

    def _kept(self, size: int) -> int:
        """What bytes in base precision become: half of those of float32, under a cast."""
        return size if self.cast is None else 2 * size // BYTES[self.premise.base_precision]

    @property
    def bytes_share(self) -> float:
        """Share of the bytes of all parameters that the map puts in low precision, as in base precision; 0 without any."""
        every = self.bytes_before + self.other_bytes
        return sum(self.layers[name].bytes for name in self.low) / every if every else 0.0

    @property
    def fingerprint(self) -> str:
        """Of what runs: weights, target, schemes, static ranges, realignment, cast; not its evidence and certificate."""
        running = {
            name: (d.scheme, self.schemes[d.scheme], d.input_scale, d.input_zero)
            for name, d in sorted(self.layers.items())
            if d.scheme is not None
        }
        repaired = [] if self.realignment is None else [self.realignment.model_dump(exclude={"n"})]
        cast = [{"cast": self.cast}] if self.cast else []
        text = json.dumps([self.premise.weights, self.target, running, *repaired, *cast], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the map as JSON; on any failure what was there before survives. Raises SaveError, MapError as `text`."""
        write_text(Path(path), self.text(indent=2) + "\n")

    def text(self, indent: int | None = None) -> str:
        """The map as JSON, to be read by `parse`.

        Raises MapError for a map that would not load again: one that was changed and kept its certificate.
        """
        for contradiction in self.contradictions():
            raise MapError(f"cannot write the map: {contradiction}; {_WHAT_TO_DO}")
        return self.model_dump_json(indent=indent)

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
            json.loads(text, object_pairs_hook=without_duplicates)
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            if first["type"] == "value_error":  # of a check of our own, which says a whole sentence
                raise MapError(
                    f"{name}: not a map that can be used: {first['msg'].removeprefix('Value error, ')}"
                ) from error
            raise MapError(f"{name}: not a precision map of version {MAP_VERSION}: {where}: {first['msg']}") from error
        except (ValueError, RecursionError) as error:
            raise MapError(
                f"{name}: expected a precision map in JSON, got something else or a part of one ({error})"
            ) from error

    def check(self, *, architecture: Mapping[str, str] | None = None, **now: str) -> None:
        """Compare fields of the premise (weights=..., search=..., ...) with what they are now.

        architecture: the modules of the model at hand (`fingerprints.modules_of`), which may compute otherwise with the
        same weights. Raises PremiseMismatch that names each difference.
        """
        differing = [
            f"{field}: the map was made for {getattr(self.premise, field)}, this is {value}"
            for field, value in now.items()
            if getattr(self.premise, field) != value
        ]
        others = [] if architecture is None else list(self.premise.other_modules(architecture))
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            differing.append(f"architecture: the map was made for other modules, {', '.join(others[:3])}{more}")
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
            lines.append(f"realignment: {self.realignment or 'none'} -> {other.realignment or 'none'}")
        if self.cast != other.cast:
            lines.append(f"cast: {self.cast or 'none'} -> {other.cast or 'none'}")
        if self.target != other.target:
            lines.append(f"target: {self.target} -> {other.target}")
        if other.premise.architecture is not None:
            lines += self.premise.other_modules(other.premise.architecture)
        for field in Premise.model_fields:
            if field != "architecture" and getattr(self.premise, field) != getattr(other.premise, field):
                lines.append(f"premise {field}: {getattr(self.premise, field)} -> {getattr(other.premise, field)}")
        return tuple(lines)


def _running(decision: Decision | None, of: PrecisionMap) -> object:
    if decision is None or decision.scheme is None:
        return None if decision is None else "base precision"
    return (decision.scheme, json.dumps(of.schemes[decision.scheme]), decision.input_scale, decision.input_zero)


def _said(decision: Decision | None) -> str:
    return "not in the map" if decision is None else decision.said

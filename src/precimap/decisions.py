"""The parts of a precision map: what one layer does and why, what the map was made from, what is done to the last logit.

Invariant: frozen values of a map's file (`certificate.Record`); what says against itself in one part is refused there.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from precimap.certificate import Record
from precimap.numerics.schemes import Scheme


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
    error: float = Field(ge=0)
    lower: float | None
    upper: float | None
    n: int = Field(ge=1)
    clusters: int = Field(ge=1)
    changed: int = Field(ge=0)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if max(self.changed, self.clusters) > self.n:
            raise ValueError(f"{self.changed} units changed, in {self.clusters} clusters, of {self.n} units in all")
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise ValueError(f"the lower bound {self.lower:g} is above the upper bound {self.upper:g}")
        return self


Cast = Literal["bfloat16", "float16"]  # as torch names the dtypes

LOOKUPS = frozenset({"embedding", "embedding_bag"})


def keeps_parameter(ops: tuple[str, ...], also_read_by: tuple[str, ...], scheme: Scheme) -> bool:
    """Whether a parameter stays beside its codes: for who reads it and multiplies nothing, and for lookups of a tied table,
    which stay in base precision where only the product is low."""
    return bool(also_read_by) or (scheme.computes_low and not LOOKUPS.isdisjoint(ops))


class Decision(Record):
    """What one layer does. `scheme` None means base precision; the input range belongs to static schemes.

    `contracted` are the dims of the weight that its ops sum over, None where they differ: with the shape, all that
    is needed to make the layer's codes again without looking at a batch. `evidence` was measured by a direct probe,
    `predicted` by the screen: by scheme, either or both may lack one. `also_read_by`: calls that read the weight and
    multiply nothing; they go on reading the parameter itself. flops_share: of the FLOPs in products that hold a weight or
    may hold one; `PrecisionMap.share_of` is of all.
    """

    scheme: str | None
    verdict: Verdict
    reason: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    ops: tuple[str, ...]
    contracted: tuple[int, ...] | None
    input_scale: float | None = Field(default=None, gt=0)
    input_zero: int | None = None
    evidence: dict[str, Evidence] = Field(default_factory=dict)
    predicted: dict[str, Evidence] = Field(default_factory=dict)
    flops_share: float = Field(default=0.0, ge=0, le=1)
    bytes: int = Field(default=0, ge=0, lt=2**63)
    also_read_by: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """What it runs in, for a comparison of maps."""
        if self.scheme is None:
            return "base precision"
        return self.scheme if self.input_scale is None else f"{self.scheme} (input scale {self.input_scale:g})"

    def keeps(self, scheme: Scheme) -> bool:
        """Whether the parameter stays beside its codes."""
        return keeps_parameter(self.ops, self.also_read_by, scheme)

    @model_validator(mode="after")
    def _dims_are_there(self) -> Self:
        if not set(self.contracted or ()) <= set(range(len(self.shape))):
            raise ValueError(f"expected contracted dims of the shape {self.shape}, got {self.contracted}")
        return self


class OfModel(Record):
    """What a share of the whole model is of; without it a map speaks of the products of weights and of its layers alone.

    weights_share: of all FLOPs, in products that hold a weight or may hold one, which `Decision.flops_share` counts in.
    bytes: of all parameters.
    """

    weights_share: float = Field(ge=0, le=1)
    bytes: int = Field(ge=0, lt=2**63)


class Premise(Record):
    """What a map was made from.

    architecture: the model's modules by name, as they print themselves; None in maps from before it was written down, of
    which it is not known.
    """

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
    architecture: dict[str, str] | None = None

    def other_modules(self, now: Mapping[str, str]) -> Iterator[str]:
        """Each module that is another one in a model whose modules are `now`, a phrase each. Names without parentheses
        are of modules that could not print themselves, and are compared by their class."""
        known = now if self.architecture is None else self.architecture
        for name in dict.fromkeys((*known, *now)):
            was, found = known.get(name, "no module"), now.get(name, "no module")
            bare = "(" not in was or "(" not in found
            if was != found and not (bare and was.split("(")[0] == found.split("(")[0]):
                yield f"module {name or 'of the whole'}: {was} -> {found}"


class UnitSketch(Record):
    """By which the units that chose a map are known again: how many there are, and the smallest of their prints.

    prints: base64 of uint64, ascending, see `precimap.searching.certificate.known_units`.
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

"""The seam between choosing and running: what a search asks of the hardware that a map is for.

`refusal` says why a layer cannot run there in a scheme; `running` gives a model that computes a map as it will be served;
`timer` takes the time of a layer there, where there is any to take. The default target, `EMULATED`, runs
anything the quantiser can do, slowly; the real ones are in `runtime`.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from precimap.hardware_profile import Device
from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer, quantized
from precimap.numerics.schemes import Scheme

BASE = ""  # how a timer calls the module as it is; no scheme has this name


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of one call, by turn; a turn has the same place in every list.

    alone: of the module as it is (`BASE`) and of each form as it is deployed, by the name of its scheme. shared: of the
    forms whose input a sibling has quantised just before; without those that share nothing.
    """

    alone: dict[str, list[float]]
    shared: dict[str, list[float]]


class Timer(Protocol):
    """Takes the times of single layers on one target."""

    def device(self) -> Device:
        """Where it takes them, as things stand."""

    def seconds(self, module: nn.Module, forms: Mapping[str, QuantizedLayer], rows: int, each: int) -> Turns:
        """Seconds of `module` and of each form, as `Turns` says, interleaved.

        Of an nn.Linear on float inputs [rows, K], of an nn.Embedding on ids [rows], of an nn.EmbeddingBag on ids
        [rows, each]. The module is not modified.
        """


class Target(Protocol):
    """Hardware, or its emulation, that a map is made for."""

    @property
    def name(self) -> str:
        """As written in a map."""

    @property
    def claim(self) -> str:
        """What a certificate measured with `running` speaks of, a sentence."""

    @property
    def timer(self) -> Timer | None:
        """None where time means nothing: gains are then counted in FLOPs."""

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        """Why this target cannot run the layer in the scheme, or None. Rules of all hardware are in `refusals`."""

    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> AbstractContextManager[nn.Module]:
        """A model that computes `layers` in low precision while the block lasts; `model` itself is not modified."""


class Emulated:
    """Quantise-dequantise around the original ops, on any device."""

    name = "emulated"
    claim = "Exact codes and scales, emulated outputs: a GPU's sums differ in last bits."
    timer = None

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        return None

    @contextmanager
    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
        with quantized(model, layers):
            yield model


EMULATED = Emulated()

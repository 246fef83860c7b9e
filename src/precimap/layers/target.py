"""The seam between choosing and running: what a search asks of the hardware that a map is for.

`refusal` says why a layer cannot run there in a scheme; `running` gives a model that computes a map as it will be
served. The default target, `EMULATED`, runs anything the quantiser can do, slowly; the real ones are in `runtime`.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import nn

from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer, quantized
from precimap.numerics.schemes import Scheme


class Target(Protocol):
    """Hardware, or its emulation, that a map is made for."""

    @property
    def name(self) -> str:
        """As written in a map."""

    @property
    def claim(self) -> str:
        """What a certificate measured with `running` speaks of, a sentence."""

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        """Why this target cannot run the layer in the scheme, or None. Rules of all hardware are in `refusals`."""

    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> AbstractContextManager[nn.Module]:
        """A model that computes `layers` in low precision while the block lasts; `model` itself is not modified."""


class Emulated:
    """Quantise-dequantise around the original ops, on any device."""

    name = "emulated"
    claim = "Exact codes and scales, emulated outputs: a GPU's sums differ in last bits."

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        return None

    @contextmanager
    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
        with quantized(model, layers):
            yield model


EMULATED = Emulated()

"""The seam between choosing and running: what a search asks of the hardware that a map is for.

`refusal` says why a layer cannot run there in a scheme; `running` gives a model that computes a map as it will be served;
`timer` takes the time of a layer there, where there is any to take, and `whole_timer` that of the whole model. The
default target, `EMULATED`, runs anything the quantiser can do, slowly; the real ones are in `runtime`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from precimap.errors import InputError
from precimap.hardware_profile import Device
from precimap.layers.emulation import quantized
from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer
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


class WholeTimer(Protocol):
    """Takes the times of whole models on one target, in every form that a model can be served in there."""

    @property
    def served(self) -> str:
        """The form that the target's `running` gives, out of those of `forms`."""

    @property
    def casts(self) -> tuple[torch.dtype, ...]:
        """The dtypes that are fast here and that a model may be cast to as a whole instead of getting a map."""

    def device(self) -> Device:
        """Where it takes the times, as things stand."""

    def forms(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Mapping[str, Callable[[], nn.Module]]:
        """By name, what makes `model` with `layers` in low precision (none: as it is) in a form, in a tree of its own.

        What makes a form raises DeployError where this machine cannot. Forms may share parts among themselves.
        """

    def most_shapes(self, form: str) -> int | None:
        """How many different shapes of calls a model can be served with in a form; None where any number is fine."""

    def check(self, model: nn.Module) -> None:
        """After a call through a task's forward. Raises DeployError for a model that did not run in its form."""

    def turns(self, cases: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
        """Seconds of each case by turn, interleaved; as many turns as fit into about `seconds`, within limits."""

    def peak_memory(self, call: Callable[[], object]) -> int | None:
        """Bytes that a call holds at most beside what was there before; None where that is not to be seen."""

    def peak_flops(self, dtype: torch.dtype) -> float:
        """Of a large product in this precision, operations per second: the best of a few."""


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

    @property
    def whole_timer(self) -> WholeTimer | None:
        """None where a whole model cannot be timed as it will be served."""

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        """Why this target cannot run the layer in the scheme, or None. Rules of all hardware are in `refusals`."""

    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> AbstractContextManager[nn.Module]:
        """A model that computes `layers` in low precision, as it is served, while the block lasts; `model` stays."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine on which a model may be served in several forms. Each is a target of its own, with times and certificates of
    its own; a search for the hardware finds the form first (`searching/timing/form.py`)."""

    name: str
    forms: Mapping[str, Target]

    def of_map(self, target: str) -> Target:
        """The form that a map, or a profile, of this target is for. Raises InputError where it is for none of these."""
        found = next((form for form in self.forms.values() if form.name == target), None)
        if found is None:
            known = " or ".join(form.name for form in self.forms.values())
            raise InputError(f"expected something made for {known}, which are the forms of {self.name}, got {target}")
        return found


class Emulated:
    """Quantise-dequantise around the original ops, on any device."""

    name = "emulated"
    claim = "Exact codes and scales, emulated outputs: a GPU's sums differ in last bits."
    timer = None
    whole_timer = None

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        return None

    @contextmanager
    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
        with quantized(model, layers):
            yield model


EMULATED = Emulated()


def as_given(target: Target, model: nn.Module) -> AbstractContextManager[nn.Module]:
    """The base model, as what a target runs is compared with it: beside the emulation in the emulation's own mode.

    Some of torch's modules take other ways under a mode, and their results differ in last bits.
    """
    return target.running(model, {}) if isinstance(target, Emulated) else nullcontext(model)

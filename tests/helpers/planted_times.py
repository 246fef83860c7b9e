"""Whole models whose times are planted: real models in every form, and a table says what each took."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from precimap import Effort
from precimap.errors import DeployError
from precimap.hardware_profile import Device
from precimap.layers.copying import shared_copy
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.target import Emulated
from precimap.runtime.emulated import deployed

HERE = Device(name="a", capability="b", threads=1, allocator="default", clock="processor time", torch="2", precimap="0")
TURNS = (0.9, 0.95, 1.0, 1.05, 1.1)
QUIET = Effort(rounding_draws=0, timing_seconds=1.0)


@dataclass
class TableWhole:
    """Milliseconds by "precision, form", the map's in every turn, the others' spread by `TURNS`.

    shapes: that the form graphs takes; None: there is no such form.
    """

    table: Mapping[str, float]
    broken: tuple[str, ...] = ()
    where: Device = HERE
    served: str = "eager"
    shapes: int | None = None
    casts: tuple[torch.dtype, ...] = (torch.float16,)
    turned: list[tuple[str, ...]] = field(default_factory=list)

    def device(self) -> Device:
        return self.where

    def forms(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Mapping[str, Callable[[], nn.Module]]:
        def fails() -> nn.Module:
            raise DeployError("no compiler here")

        copied = deployed(model, layers) if layers else shared_copy(model)
        forms = {"eager": lambda: copied, "compiled": fails if "compiled" in self.broken else lambda: copied}
        return forms if self.shapes is None else {**forms, "graphs": lambda: copied}

    def most_shapes(self, form: str) -> int | None:
        return self.shapes if form == "graphs" else None

    def check(self, model: nn.Module) -> None:
        pass

    def turns(self, cases: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
        assert seconds in (0.0, QUIET.timing_seconds), "few turns, and as many as were asked for where it is close"
        for call in cases.values():
            call()
        self.turned.append(tuple(cases))
        spread = {name: (1.0,) * len(TURNS) if name == "map, eager" else TURNS for name in cases}
        return {name: [1e-3 * self.table.get(name, 4.0) * turn for turn in spread[name]] for name in cases}

    def peak_memory(self, call: Callable[[], object]) -> int | None:
        return 1000

    def peak_flops(self, dtype: torch.dtype) -> float:
        return 1e9


class Whole(Emulated):
    """Emulated arithmetic with whole models timed by a table."""

    name = "whole"

    def __init__(self, timer: TableWhole) -> None:
        self._timer = timer

    @property
    def whole_timer(self) -> TableWhole:  # type: ignore[override]
        return self._timer

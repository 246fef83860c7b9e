"""The whole models that are held against each other: the base, blanket low precision, casts and a map, in every form.

Invariant: each is made once in a search, as it is served, whichever step asks first; compiling one takes longer than timing
it. A map that puts every layer low that can be is the blanket model, and no second one is made.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from precimap.end_to_end import BASE, BLANKET
from precimap.layers.casting import CASTS, cast
from precimap.layers.prepared import prepared
from precimap.layers.target import WholeTimer
from precimap.numerics.schemes import Scheme
from precimap.precision_map import PrecisionMap
from precimap.searching.subject import Subject

Form = tuple[str, str]  # precision, and how it is served
Make = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelForms:
    """timer: makes and times models in the forms of the target."""

    subject: Subject
    timer: WholeTimer
    _beside: dict[Form, Make] = field(default_factory=dict)
    _low: dict[str, Scheme] = field(default_factory=dict)  # what blanket low precision is in `_beside`

    def rivals(self) -> dict[Form, Make]:
        """What every map is compared with: the base model, blanket low precision, and casts of the whole."""
        if not self._beside:
            task, forms = self.subject.run.task, self.timer.forms
            self._low.update(self._all_low())
            made = {BASE: forms(task.model, {}), BLANKET: forms(task.model, self.subject.quantized(self._low))}
            for name, dtype in CASTS.items():
                if dtype in self.timer.casts and name != task.base_precision:
                    made[name] = forms(cast(task.model, name), {})
            every = {(name, form): make for name, found in made.items() for form, make in found.items()}
            self._beside.update({key: functools.cache(make) for key, make in every.items()})
        return self._beside

    def of(self, precision_map: PrecisionMap) -> dict[str, Make]:
        """By form."""
        rivals = self.rivals()
        choice = {name: precision_map.scheme_of(name) for name in precision_map.low}
        if precision_map.cast is None and precision_map.realignment is None and choice == self._low:
            return {form: make for (precision, form), make in rivals.items() if precision == BLANKET}
        made = self.timer.forms(*prepared(self.subject.run.task.model, precision_map))
        return {form: functools.cache(make) for form, make in made.items()}

    def blanket(self, scheme: Scheme) -> Mapping[str, Make]:
        """Every layer that can compute low does, under `scheme` where it can."""
        return self.timer.forms(self.subject.task.model, self.subject.quantized(self._all_low(scheme)))

    def _all_low(self, first: Scheme | None = None) -> dict[str, Scheme]:
        """Under `first`, or the shortest that a layer can take."""
        chosen: dict[str, Scheme] = {}
        low = [scheme for scheme in self.subject.schemes if scheme.computes_low]
        for scheme in sorted(low, key=lambda one: (one != first, one.weight_bits)):
            for (layer, name), reason in self.subject.eligibility.refusals.items():
                if name == scheme.name and reason is None and layer not in self.subject.eligibility.pinned:
                    chosen.setdefault(layer, scheme)
        return chosen

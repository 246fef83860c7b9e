"""What a linter found in a checkpoint.

Invariant: each finding names the layer, the rule, what the engine would do and what to do about it. `misread`: it computes
something else, without a word. `refused`: it stops. `note`: true on some hardware, or of some of its models only.
"""

from collections.abc import Sequence
from typing import Literal

from precimap.certificate import Record

Effect = Literal["misread", "refused", "note"]


class Finding(Record):
    """layers: modules by the checkpoint's names; none for what is said of the whole."""

    rule: str
    effect: Effect
    layers: tuple[str, ...]
    engine_does: str
    to_do: str

    @property
    def said(self) -> str:
        """In one sentence."""
        named = ", ".join(self.layers[:3]) + (f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else "")
        return f"{f'{named}: ' if named else ''}{self.engine_does}; {self.to_do} [{self.rule}]"


class Linted(Record):
    """engine: whose reading it is of. layers: how many modules are in each kind, those that are not quantised included."""

    engine: str
    layers: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def misread(self) -> tuple[Finding, ...]:
        """Those with which the checkpoint must not be served: misread, or refused."""
        return tuple(one for one in self.findings if one.effect != "note")


def by_layer(rule: str, effect: Effect, said: tuple[str, str], layers: Sequence[str]) -> list[Finding]:
    """One finding of all these layers; none of none. said: what the engine does, and what to do."""
    does, to_do = said
    made = Finding(rule=rule, effect=effect, layers=tuple(layers), engine_does=does, to_do=to_do)
    return [made] if layers else []

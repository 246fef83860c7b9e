"""Which layers gain no time under a scheme, in the best case that their siblings allow, and so are no candidates.

Invariant: what engines fuse is judged as one; a difference inside the spread is no gain. In the best case all siblings that
could take the scheme go along, so that a layer's input is quantised already; and together they gain what is left after it
was quantised once. Torch-free.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from precimap.layers.inventory import Inventory
from precimap.searching.latency.savings import Saved, Savings
from precimap.searching.pairs import Key

_Items = dict[str, list[str]]  # by the name of a must-share group, or of a layer alone: its layers


def too_slow(inventory: Inventory, pairs: Iterable[Key], savings: Savings, base: Mapping[str, float]) -> dict[Key, str]:
    """Why pairs are no candidates. pairs: those that compute low; what only stores low is made to save bytes, and its time
    excludes nothing. base: each layer's share of the time."""
    together: dict[str, _Items] = defaultdict(lambda: defaultdict(list))
    for name, scheme in pairs:
        together[scheme][inventory.layer(name).fused or name].append(name)
    found: dict[Key, str] = {}
    for scheme, items in together.items():
        judge = _Judge(savings, scheme, base)
        for group, why in judge.out(items).items():
            found.update({(name, scheme): why for name in items[group]})
    return found


class _Judge:
    """Of one scheme."""

    def __init__(self, savings: Savings, scheme: str, base: Mapping[str, float]) -> None:
        self._savings, self._scheme, self._base = savings, scheme, base

    def out(self, items: _Items) -> dict[str, str]:
        """By item that does not gain, the reason. One that is out takes its share of the input away from the others."""
        left, found = dict(items), dict[str, str]()
        while True:
            losing = {item: why for item in left if (why := self._alone_or_beside(item, left)) is not None}
            found |= losing
            left = {item: names for item, names in left.items() if item not in losing}
            if not losing:
                break
        for group in sorted({self._group(name) or "" for names in left.values() for name in names} - {""}):
            readers = {item: names for item, names in left.items() if any(self._group(n) == group for n in names)}
            names = [name for names in readers.values() for name in names]
            gains = any(self._lower(found, with_input=False) > 0 for found in readers.values())
            if not gains and self._lower(names, with_input=False) <= 0:
                why = self._why(names, False, f"{self._scheme} for all that share the {group}")
                found |= dict.fromkeys(readers, why)
                left = {item: names for item, names in left.items() if item not in readers}
        return found

    def _group(self, name: str) -> str | None:
        """The input that a layer could share."""
        key = (name, self._scheme)
        return None if self._savings.sharing(key) is None else self._savings.siblings[name]

    def _alone_or_beside(self, item: str, left: _Items) -> str | None:
        """Why an item gains nothing, even where others of `left` have quantised what it reads; None when it may."""
        names = left[item]
        others = {self._group(name) for other, found in left.items() if other != item for name in found}
        beside = any(self._group(name) in others - {None} for name in names)
        if self._lower(names, beside) > 0:
            return None
        what = self._scheme if len(names) == 1 else f"{self._scheme} for all of {item}"
        return self._why(names, beside, what + (", its input quantised by a sibling," if beside else ""))

    def _each(self, names: Sequence[str], with_input: bool) -> tuple[list[Saved], tuple[float, float, float]]:
        """What runs, layer by layer, and what quantising inputs takes beside that: share, lower, upper.

        with_input: the inputs that can be shared are quantised already; otherwise each of them is, once.
        """
        readers: dict[str | None, list[str]] = defaultdict(list)
        for name in names:
            readers[self._group(name)].append(name)
        each, once = [], [0.0, 0.0, 0.0]
        for group, found in readers.items():
            if group is None or (len(found) == 1 and not with_input):
                each += [self._savings.alone[name, self._scheme] for name in found]
                continue
            each += [self._savings.shared[name, self._scheme] for name in found]
            if not with_input:
                taken = self._savings.quantising[group, self._scheme]
                once = [a + b for a, b in zip(once, (taken.share, taken.lower, taken.upper), strict=True)]
        return each, (once[0], once[1], once[2])

    def _lower(self, names: Sequence[str], with_input: bool) -> float:
        """Of what they save together; what each saves alone is the least of it, whatever the spread of the rest."""
        each, (_, _, most) = self._each(names, with_input)
        alone = sum(self._savings.alone[name, self._scheme].lower for name in names)
        return max(alone, sum(one.lower for one in each) - most)

    def _why(self, names: Sequence[str], with_input: bool, what: str) -> str:
        each, (share, least, most) = self._each(names, with_input)
        weight = sum(self._base[name] for name in names)
        ratio = 1 - (sum(one.share for one in each) - share) / weight
        low = 1 - (sum(one.upper for one in each) - least) / weight
        high = 1 - (sum(one.lower for one in each) - most) / weight
        inside = ", which is within the noise of timing" if low <= 1 else ""
        n = min(one.n for one in each)
        return (
            f"{what} takes {ratio:.2f} [{low:.2f}, {high:.2f}] times as long as base precision{inside} (n = {n} turns)"
        )

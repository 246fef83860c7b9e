"""What a map is worth as a whole: the time that it was measured to save and its bytes, weighed as the user said.

Invariant: one number decides whether a map is an answer and which of two is the better one, and the spread of timing is in
it; bytes are exact. Where the user named no price, bytes count for nothing and the time decides alone.
"""

from dataclasses import dataclass

from precimap.end_to_end import EndToEnd
from precimap.precision_map import PrecisionMap
from precimap.searching.allocation.rules import Rule
from precimap.searching.allocation.table import BYTES_WORTH


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the base model's time, with quartiles; below 0 where it is lost."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:+.0%} [{self.lower:+.0%}, {self.upper:+.0%}]"


@dataclass(frozen=True, slots=True)
class Worth:
    """time: share of the base model's time saved. bytes: share of the bytes of all its parameters saved. bytes_worth: what
    saving all bytes is worth, where saving all the time is worth 1; 0 where nobody said so."""

    time: Share
    bytes: float
    bytes_worth: float

    @property
    def both(self) -> Share:
        """As a share of the base model's time."""
        more = self.bytes_worth * self.bytes
        return Share(self.time.median + more, self.time.lower + more, self.time.upper + more)

    @property
    def pays(self) -> bool:
        """Whether it is worth something beyond the spread of timing."""
        return self.both.lower > 0

    def above(self, other: "Worth") -> bool:
        """Surely worth more. They were timed one after the other, each in turns with the base model."""
        return self.both.median > other.both.upper

    def __str__(self) -> str:
        """The sum, or nothing where bytes have no price."""
        if not self.bytes_worth:
            return ""
        return (
            f"{self.time} of the time and {self.bytes:+.0%} of the bytes are saved, together worth {self.both} of the time, "
            f"as all bytes are to count {self.bytes_worth:g} times as much as all the time"
        )


def worth(rule: Rule, precision_map: PrecisionMap, times: EndToEnd) -> Worth:
    """Of a map by its measured times, under the prices of a rule."""
    before, after = precision_map.shrinks
    gain = times.gain
    time = Share(1 - 1 / gain.median, 1 - 1 / gain.lower, 1 - 1 / gain.upper)
    return Worth(time, 1 - after / before, rule.bytes_worth if rule.bytes_worth > BYTES_WORTH else 0.0)

"""How the model will be served, and where the times that a search plans with come from.

Invariant: times pass through one form, a `HardwareProfile`; what was timed here goes the same way as one that was read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from precimap.errors import InputError, ProfileError
from precimap.hardware_profile import Device, HardwareProfile
from precimap.layers.inventory import Inventory
from precimap.layers.target import EMULATED, Target, Timer
from precimap.numerics.schemes import Scheme
from precimap.searching.calibrate import Calibration
from precimap.searching.latency.planned import Latency, planned
from precimap.searching.latency.timed import checked_sizes, form_of, timed, untimed
from precimap.searching.run import Run


@dataclass(frozen=True, slots=True)
class Serving:
    """How the model will be served. batch_sizes: units of a batch, all of them counting alike; none: those of the
    profile, or the batch that discovery sees. profile: of the machine it is for, instead of timing here. peak_flops: per
    second in base precision, what utilisation is counted against; None: a large product is timed.

    Raises InputError for a size that is not at least 1, or stands twice, and for a peak that is not above zero.
    """

    batch_sizes: tuple[int, ...] = ()
    profile: HardwareProfile | None = None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        checked_sizes(self.batch_sizes)
        if self.peak_flops is not None and not 0 < self.peak_flops < float("inf"):
            raise InputError(f"expected peak FLOPs per second above zero, got {self.peak_flops}")

    def is_of(self, here: Device) -> bool:
        """Whether what is timed here is what is planned for."""
        return self.profile is None or self.profile.device == here


HERE = Serving()


def foreseen(
    inventory: Inventory, pairs: Sequence[tuple[str, Scheme]], target: Target, serving: Serving
) -> Latency | None:
    """Times by the profile; None without one.

    Raises ProfileError for a profile that lacks a time, or that is of another target; InputError for batch sizes that
    nothing reads.
    """
    if serving.profile is not None:
        notes, sizes = _said_of(serving.profile, pairs, target), serving.batch_sizes or serving.profile.batch_sizes
        return planned(inventory, pairs, serving.profile, sizes, notes)
    if serving.batch_sizes and target.timer is None and target.whole_timer is None:
        raise InputError(
            f"expected batch sizes with a profile, or with a target that is timed here; {target.name} counts FLOPs"
        )
    return None


def timed_here(
    run: Run,
    inventory: Inventory,
    calibration: Calibration,
    pairs: Sequence[tuple[str, Scheme]],
    target: Target,
    serving: Serving,
) -> Latency | None:
    """Times of all layers, and of the pairs that may be tried; None for a target without time.

    Raises JournalError for a run that was timed in part on another machine.
    """
    if target.timer is None or not pairs:
        return None
    sizes = serving.batch_sizes or (inventory.units,)
    profile = timed(run, inventory, calibration, pairs, target.name, target.timer, sizes)
    failed = untimed(run, inventory, pairs, sizes)
    left = [(name, scheme) for name, scheme in pairs if (name, scheme.name) not in failed]
    found = planned(inventory, left, profile, sizes, _said_here(profile.device, target.timer))
    return replace(found, failed=failed)


def _said_here(device: Device, timer: Timer) -> tuple[str, ...]:
    differing = device.differences(timer.device())
    if differing:
        return (f"the layers of this run were timed on another machine than this: {'; '.join(differing)}",)
    return (f"layers timed here: {device}",)


def _said_of(profile: HardwareProfile, pairs: Iterable[tuple[str, Scheme]], target: Target) -> tuple[str, ...]:
    """What is to be known of a profile. Raises ProfileError for another target, or other schemes of the same names."""
    if profile.target != target.name and target.name != EMULATED.name:
        raise ProfileError(f"expected a profile of {target.name}, or the target emulated, got one of {profile.target}")
    for scheme in {scheme.name: scheme for _, scheme in pairs}.values():
        if scheme.name in profile.schemes and profile.schemes[scheme.name] != form_of(scheme):
            raise ProfileError(f"the profile's {scheme.name} is another scheme than the one searched; measure this one")
    said = [f"times of layers by a profile of {profile.target}: {profile.device}"]
    if target.timer is not None:
        differing = profile.device.differences(target.timer.device())
        elsewhere = f"the profile is of another machine than this: {'; '.join(differing)}; no map is timed end to end"
        said = [elsewhere] if differing else said
    return tuple(said)

"""Where the times that a search plans with come from: a profile, or this machine.

Invariant: times pass through one form, a `HardwareProfile`; what was timed here goes the same way as one that was read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from precimap.errors import InputError, ProfileError
from precimap.hardware_profile import Device, HardwareProfile
from precimap.layers.inventory import Inventory
from precimap.layers.target import EMULATED, Target, Timer
from precimap.searching.latency.planned import Latency, planned
from precimap.searching.pairs import Pair, key_of
from precimap.searching.question import Serving
from precimap.searching.subject import Subject
from precimap.searching.timing.timed import form_of, timed, untimed


def times_from_profile(inventory: Inventory, pairs: Sequence[Pair], target: Target, serving: Serving) -> Latency | None:
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


def times_measured(subject: Subject, serving: Serving) -> Latency | None:
    """Times of all layers, and of the pairs that may be tried; None for a target without time.

    Raises JournalError for a run that was timed in part on another machine.
    """
    timer = subject.target.timer
    if timer is None or not subject.pairs:
        return None
    sizes = serving.batch_sizes or (subject.inventory.units,)
    profile = timed(subject, timer, sizes)
    failed = untimed(subject, sizes)
    left = [pair for pair in subject.pairs if key_of(pair) not in failed]
    found = planned(subject.inventory, left, profile, sizes, _said_here(profile.device, timer))
    return replace(found, failed=failed)


def _said_here(device: Device, timer: Timer) -> tuple[str, ...]:
    differing = device.differences(timer.device())
    if differing:
        return (f"the layers of this run were timed on another machine than this: {'; '.join(differing)}",)
    return (f"layers timed here: {device}",)


def _said_of(profile: HardwareProfile, pairs: Iterable[Pair], target: Target) -> tuple[str, ...]:
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

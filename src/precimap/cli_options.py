"""What may follow a command: the arguments and options, each written once, with the names that a user types.

Invariant: no option is defined that no command reads. A value that a user can mistype is a StrEnum or has a parser here.
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from precimap.errors import InputError
from precimap.hardware_profile import HardwareProfile
from precimap.layers.target import EMULATED, Target
from precimap.metrics.click import NE_MARGINS
from precimap.metrics.metric import RELATIVE, Metric
from precimap.numerics.schemes import SCHEMES
from precimap.runtime.compiled_target import CPU_INT8_COMPILED, CUDA_FP8_COMPILED
from precimap.runtime.cpu_int8 import CPU_INT8
from precimap.runtime.cuda_fp8 import CUDA_FP8, EXPERIMENTAL
from precimap.runtime.torchrec_tables import TORCHREC
from precimap.searching.allocation.rules import KNAPSACK, Knapsack, Rule, Threshold
from precimap.searching.latency.serving import Serving
from precimap.searching.limits import Effort


class TargetName(StrEnum):
    """What a map can be made for here."""

    EMULATED = "emulated"
    CPU_INT8 = "cpu-int8"
    CPU_INT8_COMPILED = "cpu-int8-compiled"
    CUDA_FP8 = "cuda-fp8"
    CUDA_FP8_COMPILED = "cuda-fp8-compiled"
    TORCHREC = "torchrec"


class Probes(StrEnum):
    """Which layers are measured directly. Ambiguous: those that the screen leaves open, and a random audit of it."""

    AMBIGUOUS = "ambiguous"
    ALL = "all"


class RuleName(StrEnum):
    """How a chain of maps is made."""

    KNAPSACK = "knapsack"
    THRESHOLD = "threshold"


TARGETS: dict[TargetName, Target] = {
    TargetName.EMULATED: EMULATED,
    TargetName.CPU_INT8: CPU_INT8,
    TargetName.CPU_INT8_COMPILED: CPU_INT8_COMPILED,
    TargetName.CUDA_FP8: CUDA_FP8,
    TargetName.CUDA_FP8_COMPILED: CUDA_FP8_COMPILED,
    TargetName.TORCHREC: TORCHREC,
}

TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help="file.py, file.py:function or package.module:function")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
MapArgument = Annotated[Path, typer.Argument(metavar="MAP", help="A map.json that a search wrote.")]
TargetOption = Annotated[TargetName, typer.Option(help=f"What the map is for; cuda-fp8 is {EXPERIMENTAL}.")]


class Percentage(float):
    """A margin that was given in per cent: 0.0005 for "0.05%"."""


def margin_of(text: str) -> float:
    """A number, or a percentage of the baseline's metric."""
    try:
        return Percentage(float(text.removesuffix("%")) / 100) if text.endswith("%") else float(text)
    except ValueError:
        raise typer.BadParameter(
            f"expected a number such as 0.002, or a percentage such as 0.05%, got {text!r}"
        ) from None


def check_margin(margin: float, metric: Metric) -> None:
    """Raises InputError for a percentage of a metric whose drop is not relative: nobody could tell of what."""
    if isinstance(margin, Percentage) and metric.unit != RELATIVE:
        raise InputError(
            f"expected a margin in {metric.unit or f'units of {metric.name}'}, got {100 * margin:g}%; per cent are for "
            "metrics whose drop is relative, such as NE"
        )


MarginOption = Annotated[
    float,
    typer.Option(
        help=f"The largest drop you accept, in the metric's units; of NE for instance {', '.join(NE_MARGINS)}.",
        parser=margin_of,
    ),
]
ConfidenceOption = Annotated[float, typer.Option(help="One-sided confidence of the certificate.")]
RunOption = Annotated[
    Path, typer.Option(help="Directory of the measurements and the map; taken up again if it exists.")
]
RuleOption = Annotated[RuleName, typer.Option(help="Most time saved for the margin, or each layer by itself.")]
RangeOption = Annotated[str, typer.Option(help="How static input ranges are chosen: amax, percentile:99.9 or mse.")]
AllowOption = Annotated[
    list[str] | None,
    typer.Option(help="PATTERN=SCHEME,...: the only schemes for the layer of this name, or of this shell pattern."),
]
SchemeOption = Annotated[
    list[str], typer.Option(help=f"Give several to let each layer take one; out of {', '.join(SCHEMES)}.")
]
GainOption = Annotated[
    float,
    typer.Option(help="Least gain of a map: the share of the layers' time that it saves, and its bytes' worth."),
]
BitsOption = Annotated[float | None, typer.Option(help="Limit of the average bits of a weight, scales included.")]
RealignOption = Annotated[
    bool, typer.Option("--realign", help="Fold a label-free scale and bias of the logit into the last layer.")
]
BytesOption = Annotated[
    float, typer.Option(help="What saving all bytes is worth, where saving all of the layers' time is worth 1.")
]


def allowed_of(rules: Sequence[str]) -> dict[str, list[str]]:
    """Pattern -> names of schemes, of rules such as "tower.*=fp8,int8-static". Raises InputError for another form."""
    found = {}
    for text in rules:
        pattern, equals, names = text.rpartition("=")
        if not equals:
            raise InputError(f"expected --allow PATTERN=SCHEME,SCHEME (or PATTERN= for none), got {text!r}")
        found[pattern] = [name for name in names.split(",") if name]
    return found


def sizes_of(text: str) -> tuple[int, ...]:
    """Whole numbers between commas: "64,1024"."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"expected batch sizes such as 64,1024, got {text!r}") from None


BatchSizesOption = Annotated[
    str,
    typer.Option(help="Units of a batch when it is served, such as 64,1024; default the profile's, or as in the data."),
]
TimingOption = Annotated[
    float, typer.Option(help="Of timing a map end to end, at each batch size, about; 0: none is timed as a whole.")
]
PeakOption = Annotated[
    float | None, typer.Option(help="10^12 FLOPs per second that utilisation is counted against; default measured.")
]
ProfileOption = Annotated[
    Path | None, typer.Option(help="Plan with the times of this file, made by bench-device, instead of timing here.")
]
BudgetOption = Annotated[
    float | None, typer.Option(help="Alpha that the certify split may give away in all; default 1 - confidence.")
]


def rule_of(name: RuleName, knapsack: Knapsack) -> Rule:
    """The rule of that name. Raises InputError for limits of the knapsack beside the threshold."""
    if name is RuleName.KNAPSACK:
        return knapsack
    if knapsack != KNAPSACK:
        raise InputError(
            "expected --minimum-gain, --maximum-bytes, --effective-bits and --bytes-worth with the knapsack; "
            "the threshold has no budget"
        )
    return Threshold()


def effort_of(
    probe: Probes, screen_mb: int, replay_mb: int, rounding_draws: int, timing_seconds: float, minutes: float | None
) -> Effort:
    """How hard to look; memories in MB."""
    return Effort(
        probe_all=probe is Probes.ALL,
        screen_memory=screen_mb << 20,
        replay_memory=replay_mb << 20,
        rounding_draws=rounding_draws,
        timing_seconds=timing_seconds,
        minutes=minutes,
    )


def serving_of(batch_sizes: str, profile: Path | None, peak_tflops: float | None) -> Serving:
    """How the model is served. Raises InputError for batch sizes that are none, ProfileError for a bad file."""
    planned_for = None if profile is None else HardwareProfile.load(profile)
    return Serving(sizes_of(batch_sizes), planned_for, None if peak_tflops is None else 1e12 * peak_tflops)

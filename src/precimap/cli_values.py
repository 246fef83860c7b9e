"""What was typed after a command, as the values that it works with.

Apart from `cli_options`, which `--help` needs, because this imports torch: commands import it when they start to work.
"""

from collections.abc import Sequence
from pathlib import Path

from precimap.cli_options import FormName, RuleName
from precimap.errors import InputError
from precimap.hardware_profile import HardwareProfile
from precimap.numerics.schemes import Scheme, range_rule_from_row, schemes_of
from precimap.searching.allocation.knapsack import Constraints
from precimap.searching.allocation.rules import KNAPSACK, Knapsack, Rule, Threshold
from precimap.searching.question import Serving


def ranged_schemes(names: Sequence[str], input_range: str) -> list[Scheme]:
    """The schemes of these names, those with static input ranges under that rule. Raises SchemeError for an unknown one."""
    rule = range_rule_from_row(input_range)
    return [found.with_range(rule) if found.needs_calibration else found for found in schemes_of(names)]


def allowed_of(rules: Sequence[str]) -> dict[str, list[str]]:
    """Pattern -> names of schemes, of rules such as "tower.*=fp8,int8-static". Raises InputError for another form."""
    found = {}
    for text in rules:
        pattern, equals, names = text.rpartition("=")
        if not equals:
            raise InputError(f"expected --allowed PATTERN=SCHEME,SCHEME (or PATTERN= for none), got {text!r}")
        found[pattern] = [name for name in names.split(",") if name]
    return found


def sizes_of(text: str) -> tuple[int, ...]:
    """Whole numbers between commas: "64,1024"."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"expected batch sizes such as 64,1024, got {text!r}") from None


def rule_of(
    name: RuleName,
    minimum_gain: float,
    maximum_bytes: int | None,
    effective_bits: float | None,
    bytes_worth: float,
) -> Rule:
    """The rule of that name. Raises InputError for limits of the knapsack beside the threshold."""
    knapsack = Knapsack(Constraints(minimum_gain, maximum_bytes), effective_bits, bytes_worth)
    if name is RuleName.KNAPSACK:
        return knapsack
    if knapsack != KNAPSACK:
        raise InputError(
            "expected --minimum-gain, --maximum-bytes, --effective-bits and --bytes-worth with the knapsack; "
            "the threshold has no budget"
        )
    return Threshold()


def serving_of(batch_sizes: str, profile: Path | None, peak_tflops: float | None, form: FormName) -> Serving:
    """How the model is served. Raises InputError for batch sizes that are none, ProfileError for a bad file."""
    planned_for = None if profile is None else HardwareProfile.load(profile)
    return Serving(sizes_of(batch_sizes), planned_for, peak_tflops, form.value)

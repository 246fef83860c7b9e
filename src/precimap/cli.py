"""The command line: parses, calls one verb, prints. Nobody else prints.

stdout is the result (`--json` for machines), stderr is progress and errors. Exit codes: 0 done, 1 the answer is no (not
certified), 2 the input is wrong, 70 an error that precimap did not expect, 74 the result cannot be printed, 130 interrupted.
"""

import functools
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from precimap.cli_ending import DONE, NO, Result, ended, unexpected
from precimap.cli_options import (
    TARGETS,
    AllowOption,
    BatchSizesOption,
    BitsOption,
    BudgetOption,
    BytesOption,
    ConfidenceOption,
    GainOption,
    JsonOption,
    MapArgument,
    MarginOption,
    PeakOption,
    Probes,
    ProfileOption,
    RangeOption,
    RealignOption,
    RuleName,
    RuleOption,
    RunOption,
    SchemeOption,
    TargetName,
    TargetOption,
    TaskArgument,
    TimingOption,
    allowed_of,
    check_margin,
    effort_of,
    rule_of,
    serving_of,
    sizes_of,
)
from precimap.demos.demo import run_demo, unused_directory
from precimap.errors import MapError, UncertifiedMapWarning
from precimap.numerics.schemes import SCHEMES, range_rule_from_row
from precimap.numerics.schemes import scheme as scheme_by_name
from precimap.precision_map import PrecisionMap
from precimap.report.inventory_table import inventory_table
from precimap.report.plan_table import plan_page
from precimap.report.profile_table import profile_page
from precimap.report.progress_bar import progress_bar
from precimap.report.proof import certificate_text
from precimap.report.run_record import read_run
from precimap.report.tables import preflight_text, run_page
from precimap.report.terminal import Terminal, lines_of
from precimap.runtime.checkpoint import save_deployed
from precimap.runtime.cuda_fp8 import EXPERIMENTAL, marked
from precimap.runtime.deploy import deploy as deploy_map
from precimap.runtime.deploy import deployment_of
from precimap.searching.allocation.knapsack import Constraints
from precimap.searching.allocation.rules import Knapsack
from precimap.searching.certificate.recertify import recertify
from precimap.searching.evidence.known import BYTES_WORTH
from precimap.searching.inventories import inventory_of
from precimap.searching.latency.timed import bench_device as time_layers
from precimap.searching.limits import USUAL_EFFORT
from precimap.searching.pipeline import search as search_task
from precimap.searching.planning import plan as plan_task
from precimap.searching.preflight import check_weights
from precimap.task_file import load_task

app = typer.Typer(
    help="Find, prove and deploy the precision map that your own metric cannot tell from the original.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_errors = Terminal(stderr=True)
Asked = ParamSpec("Asked")


def command(function: Callable[Asked, Result]) -> Callable[Asked, None]:
    """A verb of the command line: what it returns is printed, and it ends with the exit code of that."""

    @app.command()
    @functools.wraps(function)
    def verb(*args: Asked.args, **kwargs: Asked.kwargs) -> None:
        raise typer.Exit(ended(lambda: function(*args, **kwargs)))

    return verb


@command
def layers(task: TaskArgument, as_json: JsonOption = False) -> Result:
    """List every layer of the model, and why the other parameters are none."""
    loaded = load_task(task)
    check_weights(loaded)
    inventory = inventory_of(loaded)
    return Result(asdict(inventory), inventory_table(inventory), as_json)


@command
def search(
    task: TaskArgument,
    margin: MarginOption,
    scheme: SchemeOption,
    run: RunOption,
    confidence: ConfidenceOption = 0.95,
    rule: RuleOption = RuleName.KNAPSACK,
    cutoff: Annotated[float | None, typer.Option(help="Per layer; default margin / number of candidates.")] = None,
    target: TargetOption = TargetName.EMULATED,
    pin: Annotated[
        list[str] | None, typer.Option(help="Keep the layer of this name, or those that match this shell pattern.")
    ] = None,
    allow: AllowOption = None,
    input_range: RangeOption = "amax",
    probe: Annotated[Probes, typer.Option(help="Which layers are measured one at a time.")] = Probes.AMBIGUOUS,
    minimum_gain: GainOption = 0.0,
    maximum_bytes: Annotated[int | None, typer.Option(help="Of all layers together, under the map.")] = None,
    bytes_worth: BytesOption = BYTES_WORTH,
    effective_bits: BitsOption = None,
    rounding_draws: Annotated[int, typer.Option(help="Shifted rounding grids for the final map; 0: none.")] = 8,
    screen_memory: Annotated[int, typer.Option(help="MB that the screen may hold for a batch.")] = 4096,
    replay_memory: Annotated[int, typer.Option(help="MB of recorded results that probes may hold.")] = 4096,
    max_minutes: Annotated[float | None, typer.Option(help="Then certify the best answer so far.")] = None,
    alpha_budget: BudgetOption = None,
    realign: RealignOption = False,
    profile: ProfileOption = None,
    batch_sizes: BatchSizesOption = "",
    timing_seconds: TimingOption = USUAL_EFFORT.timing_seconds,
    peak_tflops: PeakOption = None,
    as_json: JsonOption = False,
) -> Result:
    """Find a precision map and certify it. Exit code 1 when no map is certified."""
    asked = range_rule_from_row(input_range)
    schemes = [found.with_range(asked) if found.needs_calibration else found for found in map(scheme_by_name, scheme)]
    loaded = load_task(task)
    check_margin(margin, loaded.metric)
    with progress_bar(_errors) as progress:
        result = search_task(
            loaded,
            schemes=schemes,
            margin=margin,
            confidence=confidence,
            rule=rule_of(rule, Knapsack(Constraints(minimum_gain, maximum_bytes), effective_bits, bytes_worth)),
            cutoff=cutoff,
            target=TARGETS[target],
            pinned=pin or (),
            allowed=allowed_of(allow or ()),
            alpha_budget=alpha_budget,
            effort=effort_of(probe, screen_memory, replay_memory, rounding_draws, timing_seconds, max_minutes),
            serving=serving_of(batch_sizes, profile, peak_tflops),
            run=run,
            realign=realign,
            progress=progress,
            on_preflight=lambda found: _errors.print(preflight_text(asdict(found))),
        )
    record = read_run(run)
    return Result(record.as_row(), run_page(record), as_json, DONE if result.certified else NO)


@command
def plan(
    task: TaskArgument,
    margin: MarginOption,
    scheme: Annotated[list[str] | None, typer.Option(help="Several, if need be; default fp8.")] = None,
    confidence: ConfidenceOption = 0.95,
    target: TargetOption = TargetName.EMULATED,
    as_json: JsonOption = False,
) -> Result:
    """How many rows do I need? What the splits can tell at this margin and around it. Exit code 1 when no map can pass."""
    loaded = load_task(task)
    check_margin(margin, loaded.metric)
    with progress_bar(_errors) as progress:
        found = plan_task(
            loaded,
            margin,
            schemes=scheme or ["fp8"],
            confidence=confidence,
            target=TARGETS[target],
            progress=progress,
        )
    return Result(found.as_row(), plan_page(found), as_json, DONE if found.possible else NO)


@command
def certify(
    task: TaskArgument,
    precision_map: MapArgument,
    margin: MarginOption,
    confidence: ConfidenceOption = 0.95,
    alpha_budget: BudgetOption = None,
    output: Annotated[Path | None, typer.Option(help="Write the map with its new certificate here.")] = None,
    as_json: JsonOption = False,
) -> Result:
    """Judge one map on the certify split. Exit code 1 when it is not certified."""
    loaded, given = load_task(task), PrecisionMap.load(precision_map)
    check_margin(margin, loaded.metric)
    if given.target not in set(TargetName):
        raise MapError(f"{precision_map}: expected a target out of {', '.join(TargetName)}, got {given.target!r}")
    target = TARGETS[TargetName(given.target)]
    with progress_bar(_errors) as progress:
        certified = recertify(
            loaded,
            given,
            target=target,
            margin=margin,
            confidence=confidence,
            alpha_budget=alpha_budget,
            progress=progress,
            on_note=lambda note: _errors.print(lines_of([f"note: {note}"])),
        )
    assert certified.certificate is not None
    if output is not None:
        certified.save(output)
    code = DONE if certified.certificate.certified else NO
    return Result(certified.certificate.model_dump(), certificate_text(certified.certificate), as_json, code)


@command
def deploy(
    task: TaskArgument,
    precision_map: MapArgument,
    output: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    target: Annotated[
        TargetName | None, typer.Option(help=f"Default: the map's own; cuda-fp8 is {EXPERIMENTAL}.")
    ] = None,
    as_json: JsonOption = False,
) -> Result:
    """Deploy a map, compare it with its emulation on one batch, and save it."""
    loaded, given = load_task(task), PrecisionMap.load(precision_map)
    if not given.low:
        raise MapError(f"{precision_map}: the map keeps every layer at base precision; there is nothing to deploy")
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncertifiedMapWarning)  # said below, in the result
        deployed = deploy_map(loaded.model, given, target=None if target is None else target.value, task=loaded)
    found = deployment_of(deployed).agreement
    assert found is not None
    save_deployed(deployed, loaded.model, output)
    row = {
        "file": str(output),
        "layers": len(given.low),
        "target": (target or given.target),
        "not_certified": given.not_certified,
        **asdict(found),
    }
    lines = [
        f"{len(given.low)} layers deployed for {marked(row['target'])} in {time.perf_counter() - started:.1f} s",
        f"difference to the emulation: rms {found.rms_difference:.2g}, largest {found.largest_difference:.2g}, "
        f"of scores up to {found.largest_output:.3g} (n = {found.units})",
        f"saved {output}",
        *([] if given.not_certified is None else [f"NOT CERTIFIED: {given.not_certified}"]),
    ]
    return Result(row, lines_of(lines), as_json)


@command
def report(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    as_json: JsonOption = False,
) -> Result:
    """Print a run's tables again."""
    record = read_run(run)
    return Result(record.as_row(), run_page(record), as_json)


@command
def bench_device(
    task: TaskArgument,
    output: Annotated[Path, typer.Option(help="The profile to write, JSON.")],
    target: TargetOption = TargetName.CPU_INT8,
    batch_sizes: BatchSizesOption = "",
    scheme: Annotated[list[str] | None, typer.Option(help="Several, if need be; default all that run here.")] = None,
    as_json: JsonOption = False,
) -> Result:
    """Time the layers of a task's model on this machine, for `search --profile` here or elsewhere."""
    loaded = load_task(task)
    schemes = [scheme_by_name(name) for name in scheme or SCHEMES]
    with progress_bar(_errors) as progress:
        found = time_layers(
            loaded, target=TARGETS[target], batch_sizes=sizes_of(batch_sizes), schemes=schemes, progress=progress
        )
    found.save(output)
    return Result(found.model_dump(mode="json"), profile_page(found, output), as_json)


@command
def demo(
    out: Annotated[
        Path | None, typer.Option(help="A new directory; default precimap-runs/demo, demo-2, ...", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A local folder or Hugging Face id instead of the packaged model.")
    ] = None,
    as_json: JsonOption = False,
) -> Result:
    """Semantic search over the Python documentation on this machine: two maps, certified, one deployed and timed."""
    with progress_bar(_errors) as progress:
        result = run_demo(out or unused_directory(Path("precimap-runs/demo")), model, progress)
    return Result(result.as_row(), result.page(), as_json)


def main() -> None:
    """The entry point: one clear message and the exit code for whatever goes wrong, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without a letter shows its number
    try:
        app(prog_name="precimap")
    except Exception as error:  # noqa: BLE001 - of the command line itself: an exit code of 1 would be the answer no
        sys.exit(unexpected(error))

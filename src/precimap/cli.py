"""The command line: parses, calls one verb, prints. Nobody else prints.

stdout is the result (`--json` for machines), stderr is progress and errors. Exit codes: 0 done, 1 the answer is no (not
certified), 2 the input is wrong, 70 an error that precimap did not expect, 74 the result cannot be printed, 130 interrupted.

Invariant: what takes long to import (torch) is imported by the verb that needs it, inside the verb, so that help, version
and completion answer at once. Not taken: a module for each verb, which would part a verb's options from its work.
"""

import functools
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import typer

import precimap.cli_options as options
from precimap.cli_config import ConfigOption, VerboseOption, WidthOption, write_config
from precimap.cli_ending import DONE, NO, Result, ended, taken_up_again, unexpected
from precimap.cli_version import VersionOption
from precimap.errors import EmulatedWarning, MapError, UncertifiedMapWarning
from precimap.numerics.schemes import SCHEMES
from precimap.report.progress_bar import progress_bar
from precimap.report.terminal import Terminal, lines_of

if TYPE_CHECKING:
    from precimap.searching.preflight.checks import Preflight

app = typer.Typer(
    help="Choose the layers of a model that run in FP8 or INT8 while your metric stays within a margin; prove it; deploy.",
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


@app.callback()
def before_the_verb(versions: VersionOption = False) -> None:
    """What may stand before the verb; each option there ends the program by itself."""


@command
def layers(task: options.TaskArgument, as_json: options.JsonOption = False) -> Result:
    """List the layers that can take low precision, and say why other parameters cannot."""
    from precimap.report.inventory_table import inventory_table
    from precimap.searching.preflight.checks import check_weights
    from precimap.searching.subject import inventory_of
    from precimap.task_file import load_task

    loaded = load_task(task)
    check_weights(loaded)
    inventory = inventory_of(loaded)
    return Result(row=asdict(inventory), page=inventory_table(inventory), as_json=as_json)


@command
@taken_up_again
def search(
    context: typer.Context,
    task: options.TaskArgument,
    *,
    margin: options.MarginOption,
    confidence: options.ConfidenceOption = 0.95,
    cutoff: options.CutoffOption = None,
    alpha_budget: options.BudgetOption = None,
    realign: options.RealignOption = False,
    schemes: options.SchemeOption,
    rule: options.RuleOption = options.RuleName.KNAPSACK,
    target: options.TargetOption = options.TargetName.EMULATED,
    pinned: options.PinOption = None,
    allowed: options.AllowOption = None,
    input_range: options.RangeOption = "amax",
    minimum_gain: options.GainOption = 0.0,
    maximum_bytes: options.MaximumBytesOption = None,
    bytes_worth: options.BytesWorthOption = options.BYTES_WORTH,
    effective_bits: options.BitsOption = None,
    profile: options.ProfileOption = None,
    batch_sizes: options.BatchSizesOption = "",
    form: options.FormOption = options.FormName.AUTO,
    timing_seconds: options.TimingOption = options.TIMING_SECONDS,
    peak_tflops: options.PeakOption = None,
    probe_all: options.ProbeOption = False,
    rounding_draws: options.DrawsOption = options.ROUNDING_DRAWS,
    screen_memory: options.ScreenMemoryOption = options.MEMORY,
    replay_memory: options.ReplayMemoryOption = options.MEMORY,
    minutes: options.MinutesOption = None,
    run: options.RunOption,
    config: ConfigOption = None,
    verbose: VerboseOption = False,
    width: WidthOption = None,
    as_json: options.JsonOption = False,
) -> Result:
    """Find a precision map and certify it. Exit code 1 when no map is certified."""
    from precimap.cli_values import allowed_of, ranged_schemes, rule_of, serving_of
    from precimap.report.tables import preflight_text
    from precimap.searching.pipeline import search as search_task
    from precimap.searching.question import Effort
    from precimap.task_file import load_task

    def begun(found: "Preflight") -> None:
        write_config(context, run)
        _errors.print(preflight_text(found))

    effort = Effort(
        probe_all=probe_all,
        rounding_draws=rounding_draws,
        screen_memory=screen_memory,
        replay_memory=replay_memory,
        timing_seconds=timing_seconds,
        minutes=minutes,
    )
    loaded = load_task(task)
    with progress_bar(_errors) as progress:
        result = search_task(
            loaded,
            schemes=ranged_schemes(schemes, input_range),
            margin=margin,
            confidence=confidence,
            rule=rule_of(rule, minimum_gain, maximum_bytes, effective_bits, bytes_worth),
            cutoff=cutoff,
            target=target.value,
            pinned=pinned or (),
            allowed=allowed_of(allowed or ()),
            alpha_budget=alpha_budget,
            effort=effort,
            serving=serving_of(batch_sizes, profile, peak_tflops, form),
            run=run,
            realign=realign,
            progress=progress,
            on_preflight=begun,
        )
    return _recorded(run, verbose, width, as_json, DONE if result.certified else NO)


def _recorded(run: Path, verbose: bool, width: int | None, as_json: bool, code: int = DONE) -> Result:
    from precimap.report.answer_page import answer_page
    from precimap.report.run_record import read_run
    from precimap.report.tables import run_page

    record = read_run(run)
    page = run_page(record) if verbose else answer_page(record)
    return Result(row=record.as_row(), page=page, as_json=as_json, code=code, width=width)


@command
def plan(
    task: options.TaskArgument,
    *,
    margin: options.MarginOption,
    confidence: options.ConfidenceOption = 0.95,
    schemes: options.PlannedSchemeOption = None,
    target: options.TargetOption = options.TargetName.EMULATED,
    as_json: options.JsonOption = False,
) -> Result:
    """Tell how many rows a margin takes, and which margins the task's data can certify. Exit code 1 when no map can pass."""
    from precimap.report.plan_table import plan_page
    from precimap.searching.planning import plan as plan_task
    from precimap.task_file import load_task

    loaded = load_task(task)
    with progress_bar(_errors) as progress:
        found = plan_task(
            loaded, margin, schemes=schemes or "fp8", confidence=confidence, target=target.value, progress=progress
        )
    return Result(row=found.as_row(), page=plan_page(found), as_json=as_json, code=DONE if found.possible else NO)


@command
def certify(
    task: options.TaskArgument,
    precision_map: options.MapArgument,
    *,
    margin: options.MarginOption,
    confidence: options.ConfidenceOption = 0.95,
    alpha_budget: options.BudgetOption = None,
    output: options.CertifiedOption = None,
    as_json: options.JsonOption = False,
) -> Result:
    """Test a finished map on data that the search never used (the certify split).

    It passes if the upper bound of its drop is at most the margin. Exit code 1 if it does not.
    """
    from precimap.report.proof import certificate_text
    from precimap.searching.certificate.one_map import certify as certify_map
    from precimap.task_file import load_task

    loaded = load_task(task)
    with progress_bar(_errors) as progress:
        certified = certify_map(
            loaded,
            precision_map,
            margin=margin,
            confidence=confidence,
            alpha_budget=alpha_budget,
            progress=progress,
            on_note=lambda note: _errors.print(lines_of([f"note: {note}"])),
        )
    assert certified.certificate is not None
    if output is not None:
        certified.save(output)
    proof, code = certified.certificate, DONE if certified.certificate.certified else NO
    return Result(row=proof.model_dump(), page=certificate_text(proof), as_json=as_json, code=code)


@command
def deploy(
    task: options.TaskArgument,
    precision_map: options.MapArgument,
    *,
    target: options.DeployTargetOption = None,
    output: options.DeployedOption,
    as_json: options.JsonOption = False,
) -> Result:
    """Deploy a map, compare it with its emulation on one batch, and save it."""
    from precimap.precision_map import PrecisionMap
    from precimap.report.deployed_page import deployed_page
    from precimap.runtime import deploy as deploying
    from precimap.runtime.checkpoint import save_deployed
    from precimap.task_file import load_task

    loaded, given = load_task(task), PrecisionMap.load(precision_map)
    if not given.changes:
        raise MapError(f"{precision_map}: the map keeps every layer at base precision; there is nothing to deploy")
    started = time.perf_counter()
    with warnings.catch_warnings():
        for said_below in (UncertifiedMapWarning, EmulatedWarning):
            warnings.simplefilter("ignore", said_below)
        deployed = deploying.deploy(loaded.model, given, target=None if target is None else target.value, task=loaded)
    found = deploying.deployment_of(deployed).agreement
    assert found is not None
    save_deployed(deployed, loaded.model, output)
    row = {
        "file": str(output),
        "layers": len(given.low),
        "target": (target or given.target),
        "not_certified": given.not_certified,
        **asdict(found),
    }
    return Result(row=row, page=deployed_page(row, time.perf_counter() - started), as_json=as_json)


@command
def report(
    run: options.RunArgument,
    *,
    verbose: VerboseOption = False,
    width: WidthOption = None,
    as_json: options.JsonOption = False,
) -> Result:
    """Print again what a run found."""
    return _recorded(run, verbose, width, as_json)


@command
def bench_device(
    task: options.TaskArgument,
    *,
    schemes: options.TimedSchemeOption = None,
    target: options.TargetOption = options.TargetName.CPU_INT8,
    batch_sizes: options.BatchSizesOption = "",
    output: options.TimesOption,
    as_json: options.JsonOption = False,
) -> Result:
    """Time the layers of a task's model on this machine, for `search --profile` here or elsewhere."""
    from precimap.cli_values import sizes_of
    from precimap.report.profile_table import profile_page
    from precimap.searching.timing.timed import bench_device as time_layers
    from precimap.task_file import load_task

    loaded = load_task(task)
    with progress_bar(_errors) as progress:
        found = time_layers(
            loaded,
            target=target.value,
            batch_sizes=sizes_of(batch_sizes),
            schemes=schemes or list(SCHEMES),
            progress=progress,
        )
    found.save(output)
    return Result(row=found.model_dump(mode="json"), page=profile_page(found, output), as_json=as_json)


@command
def demo(
    out: options.OutOption = None, model: options.ModelOption = None, as_json: options.JsonOption = False
) -> Result:
    """Semantic search over the Python documentation on this machine: two maps, certified, one deployed and timed."""
    from precimap.demos.demo import run_demo, unused_directory

    with progress_bar(_errors) as progress:
        result = run_demo(out or unused_directory(Path("precimap-runs/demo")), model, progress)
    return Result(row=result.as_row(), page=result.page(), as_json=as_json)


def main() -> None:
    """The entry point: one clear message and the exit code for whatever goes wrong, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without a letter shows its number
    try:
        app(prog_name="precimap")
    except Exception as error:  # noqa: BLE001 - of the command line itself: an exit code of 1 would be the answer no
        sys.exit(unexpected(error))

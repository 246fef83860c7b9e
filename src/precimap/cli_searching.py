"""The verbs that look, ask and prove: layers, search, plan, certify, report.

Invariant: what takes long to import (torch) is imported by the verb that needs it, inside the verb, so that help, version
and completion answer at once. Not taken: a module for each verb, which would part a verb's options from its work.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import precimap.cli_options as options
from precimap.cli_app import ERRORS, command
from precimap.cli_config import ConfigOption, VerboseOption, WidthOption, write_config
from precimap.cli_ending import DONE, NO, Result, taken_up_again
from precimap.report.progress_bar import progress_bar
from precimap.report.terminal import lines_of

if TYPE_CHECKING:
    from precimap.searching.preflight.checks import Preflight


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
        ERRORS.print(preflight_text(found))

    effort = Effort(
        probe_all=probe_all,
        rounding_draws=rounding_draws,
        screen_memory=screen_memory,
        replay_memory=replay_memory,
        timing_seconds=timing_seconds,
        minutes=minutes,
    )
    loaded = load_task(task)
    with progress_bar(ERRORS) as progress:
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
    with progress_bar(ERRORS) as progress:
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
    with progress_bar(ERRORS) as progress:
        certified = certify_map(
            loaded,
            precision_map,
            margin=margin,
            confidence=confidence,
            alpha_budget=alpha_budget,
            progress=progress,
            on_note=lambda note: ERRORS.print(lines_of([f"note: {note}"])),
        )
    assert certified.certificate is not None
    if output is not None:
        certified.save(output)
    proof, code = certified.certificate, DONE if certified.certificate.certified else NO
    return Result(row=proof.model_dump(), page=certificate_text(proof), as_json=as_json, code=code)


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

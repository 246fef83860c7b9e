"""The verbs that put a map to work: deploy, export, lint, bench-device.

Invariant: as of `cli_searching`: torch is imported inside the verb that needs it.
"""

import time
import warnings
from dataclasses import asdict

import precimap.cli_options as options
import precimap.cli_serving_options as serving
from precimap.cli_app import ERRORS, command
from precimap.cli_ending import DONE, NO, Result
from precimap.errors import EmulatedWarning, MapError, UncertifiedMapWarning
from precimap.numerics.schemes import SCHEMES
from precimap.report.progress_bar import progress_bar


@command
def deploy(
    task: options.TaskArgument,
    precision_map: options.MapArgument,
    *,
    target: serving.DeployTargetOption = None,
    output: serving.DeployedOption,
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
def export(
    first: serving.FirstArgument,
    second: serving.SecondArgument,
    *,
    to: serving.ToOption,
    output: serving.FolderOption,
    uncertified: serving.UncertifiedOption = False,
    checkpoint: serving.CheckpointOption = None,
    as_json: options.JsonOption = False,
) -> Result:
    """Write a map as the files that a serving engine loads, and compare what they compute with what was certified."""
    from precimap.exporting.export import export as export_map
    from precimap.report.exported_page import exported_page
    from precimap.task_file import load_task

    task, precision_map = serving.task_and_map(first, second)
    loaded = load_task(task)
    with progress_bar(ERRORS) as progress:
        found = export_map(
            loaded,
            precision_map,
            to=to.value,
            output=output,
            uncertified=uncertified,
            checkpoint=checkpoint,
            progress=progress,
        )
    return Result(row=found.model_dump(mode="json"), page=exported_page(found, output), as_json=as_json)


@command
def lint(
    checkpoint: serving.CheckpointArgument, *, engine: serving.EngineOption, as_json: options.JsonOption = False
) -> Result:
    """Look at a compressed-tensors checkpoint of any tool as an engine would read it; exit 1 where it would misread."""
    from precimap.exporting.linting.lint import lint as lint_checkpoint
    from precimap.report.linted_page import linted_page

    found = lint_checkpoint(checkpoint, engine=engine.value)
    row = {**found.model_dump(mode="json"), "misread": len(found.misread)}
    return Result(row=row, page=linted_page(found, checkpoint), as_json=as_json, code=NO if found.misread else DONE)


@command
def bench_device(
    task: options.TaskArgument,
    *,
    schemes: options.TimedSchemeOption = None,
    target: options.TargetOption = options.TargetName.CPU_INT8,
    batch_sizes: options.BatchSizesOption = "",
    output: serving.TimesOption,
    as_json: options.JsonOption = False,
) -> Result:
    """Time the layers of a task's model on this machine, for `search --profile` here or elsewhere."""
    from precimap.cli_values import sizes_of
    from precimap.report.profile_table import profile_page
    from precimap.searching.timing.timed import bench_device as time_layers
    from precimap.task_file import load_task

    loaded = load_task(task)
    with progress_bar(ERRORS) as progress:
        found = time_layers(
            loaded,
            target=target.value,
            batch_sizes=sizes_of(batch_sizes),
            schemes=schemes or list(SCHEMES),
            progress=progress,
        )
    found.save(output)
    return Result(row=found.model_dump(mode="json"), page=profile_page(found, output), as_json=as_json)

"""The main job on the embedded default, end to end: two maps, both certified, one deployed and timed as a whole.

The FP8 map is for a GPU with FP8 arithmetic: its codes and scales are exact here, its outputs emulated, its benefit counted
in FLOPs and bytes. The INT8 map holds what saves time on this CPU, in the form (eager or compiled) in which whole models are
faster here, and is certified as deployed. The two questions share one certify split, so each gets half of the alpha.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from precimap.demos.minilm import load_encoder, load_tokenizer
from precimap.demos.semantic_search import DEFAULT_SIZES, Sizes, query_task
from precimap.errors import InputError
from precimap.journal import run_journal
from precimap.numerics.schemes import SCHEMES
from precimap.precision_map import PrecisionMap
from precimap.report.run_record import RunRecord, read_run
from precimap.report.tables import run_page
from precimap.report.terminal import lines_of
from precimap.runtime.checkpoint import save_deployed
from precimap.runtime.compiling.target import CPU
from precimap.runtime.deploy import Agreement, deploy, deployment_of
from precimap.runtime.x86.target import int8_scheme
from precimap.runtime.x86.tokens import scheme_refusal
from precimap.searching.pipeline import search
from precimap.searching.progress import Progress
from precimap.searching.question import Effort
from precimap.task import Task

# Nats of log-loss, of a baseline of about 3.2 over 1,536 documents: the right one loses 1 % of its probability.
MARGIN = 0.01
CONFIDENCE = 0.975
ALPHA_BUDGET = 0.05
TIMING_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Both runs, and what was deployed: nothing (None), where no INT8 layer saves time on this CPU and is certified."""

    fp8: RunRecord
    int8: RunRecord
    agreement: Agreement | None
    files: dict[str, str]

    def as_row(self) -> dict[str, Any]:
        return {
            "fp8": self.fp8.as_row(),
            "int8": self.int8.as_row(),
            "agreement": None if self.agreement is None else asdict(self.agreement),
            "files": self.files,
        }

    def page(self) -> RenderableType:
        """Everything, for a terminal."""
        fp8_note = (
            "This CPU has no FP8 arithmetic: codes and scales are exact, outputs emulated;\n"
            "the benefit is counted in FLOPs and bytes, not timed."
        )
        return Group(
            Rule("FP8, for a GPU that has FP8 arithmetic", align="left"),
            Text(fp8_note),
            run_page(self.fp8),
            Text(),
            Rule("INT8, for this CPU", align="left"),
            run_page(self.int8),
            Text(),
            Rule("deployed", align="left"),
            self._deployed_text(),
            Text(),
            Rule("files", align="left"),
            lines_of(f"{what:<22} {path}" for what, path in self.files.items()),
        )

    def _deployed_text(self) -> Text:
        found = self.agreement
        if found is None:
            return Text("nothing: the INT8 map keeps every layer in base precision, and its answer says why")
        lines = [
            f"difference to the emulation (n = {found.units}): rms {found.rms_difference:.2g}, "
            f"largest {found.largest_difference:.2g}, scores up to {found.largest_output:.3g}",
            self._verdict(),
        ]
        return lines_of(lines)

    def _verdict(self) -> str:
        """Whether INT8 pays here, as a whole: the map may beat the model that it was searched for, and not its rivals."""
        times = None if self.int8.result is None else self.int8.result.end_to_end
        if times is None:
            return "not timed end to end"
        name, speed = times.rival()
        if speed.upper < 1:
            return f"not worth it on this CPU: {name}, takes {speed} of the map's time; serve that, or search it"
        return (
            f"INT8 pays on this CPU: {times.gain} times as fast as the base model, and {speed} times as fast as {name}, the "
            "fastest model without INT8"
        )


def run_demo(out: Path, model: str | None, progress: Progress, sizes: Sizes = DEFAULT_SIZES) -> DemoResult:
    """Search, certify, deploy and time; everything is written below `out`.

    Raises InputError without the demo extra, or for a directory that holds something already.
    """
    if out.exists():
        raise InputError(f"expected a new directory for the demo, got {out}, which exists")
    try:
        encoder, tokenizer = load_encoder(model), load_tokenizer(model)
    except ImportError as error:
        raise InputError(str(error)) from error
    task = query_task(encoder, tokenizer, sizes, progress)
    common: dict[str, Any] = {
        "margin": MARGIN,
        "confidence": CONFIDENCE,
        "alpha_budget": ALPHA_BUDGET,
        "ledger": out / "ledger",
    }
    search(task, schemes=["fp8"], run=out / "fp8", progress=_named("FP8", progress), **common)
    result = search(
        task,
        schemes=_int8(),
        target=CPU,
        effort=Effort(timing_seconds=TIMING_SECONDS),
        run=out / "int8",
        progress=_named("INT8", progress),
        **common,
    )
    found = _deployed(task, result.map, out) if result.map.low else None
    return DemoResult(read_run(out / "fp8"), read_run(out / "int8"), found, _files(out, bool(result.map.low)))


def _int8() -> str:
    """The scheme that is fastest where this machine has its kernel, or the widest that it multiplies exactly."""
    return "int8" if scheme_refusal(SCHEMES["int8"]) is None else int8_scheme()


def unused_directory(wanted: Path) -> Path:
    """`wanted`, or the first of `wanted-2`, `wanted-3`, ... that does not exist."""
    number, found = 1, wanted
    while found.exists():
        number += 1
        found = wanted.with_name(f"{wanted.name}-{number}")
    return found


def _named(prefix: str, progress: Progress) -> Progress:
    return lambda stage, done, total: progress(f"{prefix}: {stage}", done, total)


def _deployed(task: Task, precision_map: PrecisionMap, out: Path) -> Agreement:
    fast = deploy(task.model, precision_map, task=task)
    found = deployment_of(fast).agreement
    assert found is not None
    save_deployed(fast, task.model, out / "int8" / "deployed.safetensors")
    premise = read_run(out / "int8").premise
    with run_journal(out / "int8", premise) as journal:
        journal.conclude("deployment", precision_map.fingerprint, asdict(found))
    return found


def _files(out: Path, deployed: bool) -> dict[str, str]:
    return {
        "FP8 map": str(out / "fp8" / "map.json"),
        "FP8 measurements": str(out / "fp8" / "measurements.sqlite"),
        "INT8 map": str(out / "int8" / "map.json"),
        "INT8 measurements": str(out / "int8" / "measurements.sqlite"),
        **({"deployed INT8 model": str(out / "int8" / "deployed.safetensors")} if deployed else {}),
        "print a run again": f"precimap report {out / 'int8'}",
    }

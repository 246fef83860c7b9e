"""The main job on the embedded default, end to end: two maps, both certified, one deployed and timed.

The FP8 map is for a GPU with FP8 arithmetic: its codes and scales are exact here, its outputs emulated, its benefit counted
in FLOPs and bytes. The INT8 map holds what saves time on this CPU, layer by layer, and is certified as deployed. The two
questions share one certify split, so each gets half of the alpha.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text
from torch import Tensor, nn

from precimap.demos.minilm import load_encoder, load_tokenizer
from precimap.demos.semantic_search import DEFAULT_SIZES, Sizes, query_task
from precimap.errors import InputError
from precimap.journal import run_journal
from precimap.precision_map import PrecisionMap
from precimap.report.run_record import RunRecord, read_run
from precimap.report.tables import run_page
from precimap.runtime.checkpoint import save_deployed
from precimap.runtime.cpu_int8 import CPU_INT8, has_bf16, int8_scheme
from precimap.runtime.deploy import Agreement, deploy, deployment_of
from precimap.runtime.timing import Spread, interleaved, ratio, spread
from precimap.search.pipeline import search
from precimap.search.progress import Progress
from precimap.task import Task

# Nats of log-loss, of a baseline of about 3.2 over 1,536 documents: the right one loses 1 % of its probability.
MARGIN = 0.01
CONFIDENCE = 0.975
ALPHA_BUDGET = 0.05
TURNS = 7

BF16, FLOAT32, DEPLOYED = "bf16", "float32", "int8 map"


@dataclass(frozen=True, slots=True)
class Speed:
    """The deployed model against the same model in BF16 and in float32, on one batch of queries."""

    over_bf16: Spread
    over_float32: Spread
    milliseconds: dict[str, Spread]
    batch: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """Whether INT8 pays here, by the quartiles of the ratios that were taken inside each turn."""
        if self.over_bf16.upper < 1:
            return "not worth it on this CPU: the model in plain BF16 is faster; serve that, or search it"
        if self.over_float32.lower <= 1 or self.over_bf16.lower <= 1:
            return "no gain that can be told from the spread of the turns"
        return "INT8 pays on this CPU"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Both runs, and what was deployed: nothing (None), where no INT8 layer saves time on this CPU and is certified."""

    fp8: RunRecord
    int8: RunRecord
    agreement: Agreement | None
    speed: Speed | None
    files: dict[str, str]

    def as_row(self) -> dict[str, Any]:
        return {
            "fp8": self.fp8.as_row(),
            "int8": self.int8.as_row(),
            "agreement": None if self.agreement is None else asdict(self.agreement),
            "speed": None if self.speed is None else asdict(self.speed),
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
            Text("\n".join(f"{what:<22} {path}" for what, path in self.files.items())),
        )

    def _deployed_text(self) -> Text:
        speed, found = self.speed, self.agreement
        if speed is None or found is None:
            return Text("nothing: the INT8 map keeps every layer in base precision, and its answer says why")
        native = [] if has_bf16() else ["  (this CPU has no BF16 arithmetic, which makes BF16 slow here)"]
        lines = [
            f"difference to the emulation (n = {found.units}): rms {found.rms_difference:.2g}, "
            f"largest {found.largest_difference:.2g}, scores up to {found.largest_output:.3g}",
            f"speed on {speed.batch[0]} queries of {speed.batch[1]} tokens, {TURNS} interleaved turns, median [quartiles]:",
            f"  times as fast as the BF16 model:    {speed.over_bf16:.2f}",
            *native,
            f"  times as fast as the float32 model: {speed.over_float32:.2f}",
            *(f"  {name:<9} {ms:.1f} ms" for name, ms in speed.milliseconds.items()),
            f"verdict: {speed.verdict}",
        ]
        return Text("\n".join(lines))


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
    scheme = int8_scheme()
    result = search(
        task, schemes=[scheme], target=CPU_INT8, run=out / "int8", progress=_named("INT8", progress), **common
    )
    found, speed = _deployed(task, result.map, out) if result.map.low else (None, None)
    return DemoResult(read_run(out / "fp8"), read_run(out / "int8"), found, speed, _files(out, bool(result.map.low)))


def unused_directory(wanted: Path) -> Path:
    """`wanted`, or the first of `wanted-2`, `wanted-3`, ... that does not exist."""
    number, found = 1, wanted
    while found.exists():
        number += 1
        found = wanted.with_name(f"{wanted.name}-{number}")
    return found


def _named(prefix: str, progress: Progress) -> Progress:
    return lambda stage, done, total: progress(f"{prefix}: {stage}", done, total)


def _deployed(task: Task, precision_map: PrecisionMap, out: Path) -> tuple[Agreement, Speed]:
    fast = deploy(task.model, precision_map, task=task)
    found = deployment_of(fast).agreement
    assert found is not None
    batches = list(task.splits.calibration)
    save_deployed(fast, task.model, out / "int8" / "deployed.safetensors")
    speed = _speed(task, fast, batches[len(batches) // 2])
    premise = read_run(out / "int8").premise
    with run_journal(out / "int8", premise) as journal:
        journal.conclude("deployment", precision_map.fingerprint, {**asdict(found), "speed": asdict(speed)})
    return found, speed


def _speed(task: Task, fast: nn.Module, batch: dict[str, Tensor]) -> Speed:
    half = copy.deepcopy(task.model).to(torch.bfloat16)
    calls: dict[str, Callable[[], Any]] = {
        DEPLOYED: lambda: task.forward(fast, batch),
        FLOAT32: lambda: task.forward(task.model, batch),
        BF16: lambda: task.forward(half, batch),
    }
    with torch.no_grad():
        seconds = interleaved(calls, TURNS)
    return Speed(
        ratio(seconds[BF16], seconds[DEPLOYED]),
        ratio(seconds[FLOAT32], seconds[DEPLOYED]),
        {name: spread([1e3 * value for value in seconds[name]]) for name in calls},
        tuple(batch["input_ids"].shape),
    )


def _files(out: Path, deployed: bool) -> dict[str, str]:
    return {
        "FP8 map": str(out / "fp8" / "map.json"),
        "FP8 measurements": str(out / "fp8" / "measurements.sqlite"),
        "INT8 map": str(out / "int8" / "map.json"),
        "INT8 measurements": str(out / "int8" / "measurements.sqlite"),
        **({"deployed INT8 model": str(out / "int8" / "deployed.safetensors")} if deployed else {}),
        "print a run again": f"precimap report {out / 'int8'}",
    }

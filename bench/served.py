"""One map on every engine that it can be exported to: how fast each is, and how near to the form that would be certified.

    python bench/served.py [--quick] [--json FILE]

A DCNv2 1024 wide and all-MiniLM-L6-v2, every layer that this CPU takes in `int8-static`, ranges from the inputs. The map
is deployed by precimap, eager and compiled, and exported for `aoti` and `onnx`; the packages and files are loaded again
(`pm.load_exported`), by AOTInductor, ONNX Runtime and OpenVINO, and timed in turns with the BF16 model, eager and
compiled: CPU time of one thread, median [quartiles]. Error: root mean square difference of the outputs from the eager
and from the compiled deployed model, as a share of what the map itself changes. Quick: the ranker at 256 rows and few
turns. Exits with 1 when a claim fails.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import precimap as pm
from harness import Claim, at_least, at_most, command_line, finished, print_machine
from models.cpu_speed_models import Inputs, minilm, ranker
from precimap.precision_map import PrecisionMap
from precimap.runtime.timing import Spread, interleaved, ratio, spread

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from helpers.small_maps import map_over, premise_for
from helpers.zoo_deployed import calibrated, int8_choice

MODELS = {
    "ranker, 256": lambda: ranker(256),
    "ranker, 1024": lambda: ranker(1024),
    "MiniLM, 32 x 32": lambda: minilm(32, 32),
}
BF16 = ("bf16, eager", "bf16, compiled")
COMPILED, PACKAGE = "precimap, compiled", "aoti"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One form: its milliseconds, how many times as fast as the best BF16 form and as ours compiled, and how far off."""

    model: str
    form: str
    milliseconds: Spread
    times_best_bf16: Spread
    times_compiled: Spread
    share_of_map: float | None
    share_from_compiled: float | None


def main() -> int:
    arguments = command_line(__doc__, "the ranker at 256 rows, few turns").parse_args()
    torch.set_num_threads(1)
    print_machine()
    rows = []
    for name in list(MODELS)[:1] if arguments.quick else MODELS:
        model, inputs = MODELS[name]()
        rows += _served(name, model, inputs, 7 if arguments.quick else 15)
    return finished(arguments.json, rows, _claims(rows))


def _served(name: str, model: nn.Module, inputs: Inputs, turns: int) -> list[Served]:
    """The lines of one model, printed."""
    task = _task(model, inputs)
    chosen = _map(model, task)
    half, deployed = copy.deepcopy(model).bfloat16(), pm.deploy(model, chosen, target="cpu-int8")
    forms: dict[str, Callable[..., Tensor]] = {
        "bf16, eager": half,
        "bf16, compiled": pm.compile(half, inputs),
        "precimap, eager": deployed,
        COMPILED: pm.compile(deployed, inputs),
        **_exported(task, chosen),
    }
    with torch.no_grad():
        outputs = {form: call(*inputs).double() for form, call in forms.items()}
        base = model(*inputs).double()
        seconds = interleaved(
            {form: lambda c=call: c(*inputs) for form, call in forms.items()}, turns, time.process_time
        )
    best = min(BF16, key=lambda form: spread(seconds[form]).median)
    expected = outputs["precimap, eager"]
    changed = _rms(base - expected)
    rows = []
    for form in forms:
        row = Served(
            model=name,
            form=form,
            milliseconds=spread([1e3 * value for value in seconds[form]]),
            times_best_bf16=ratio(seconds[best], seconds[form]),
            times_compiled=ratio(seconds[COMPILED], seconds[form]),
            share_of_map=None if form in BF16 else _rms(outputs[form] - expected) / changed,
            share_from_compiled=None if form in BF16 else _rms(outputs[form] - outputs[COMPILED]) / changed,
        )
        rows.append(row)
        near = "" if row.share_of_map is None else f"  off by {row.share_of_map:.3f} of the map"
        print(
            f"{name:17}{form:22}{f'{row.milliseconds:.2f}':>26} ms  times best bf16 {row.times_best_bf16:.2f}  "
            f"times compiled {row.times_compiled:.2f}{near}",
            flush=True,
        )
    return rows


def _exported(task: pm.Task, chosen: PrecisionMap) -> dict[str, Callable[..., Tensor]]:
    """The engines, each with the map that was exported for it; ONNX's as far as they are installed."""
    found: dict[str, Callable[..., Tensor]] = {}
    folder = Path(tempfile.mkdtemp())
    for to in ("aoti", "onnx"):
        try:
            exported = pm.export(task, chosen, to=to, output=folder / to, uncertified=True)
        except ImportError as error:
            print(f"  without {to}: {error}")
            continue
        names = [PACKAGE] if to == "aoti" else [one.engine for one in exported.served if one.refused is None]
        found |= {name: pm.load_exported(folder / to, engine=name) for name in names}
    return found


def _task(model: nn.Module, inputs: Inputs) -> pm.Task:
    """One batch, which is every split."""
    batches = [inputs] * 3
    return pm.Task(
        model,
        splits=pm.Splits(*([batch] for batch in batches)),
        forward=lambda model, batch: model(*batch).reshape(len(batch[0]), -1),
        loss=lambda scores, _: scores.float().square().mean(1),
        metric=pm.metrics.Loss(),
    )


def _map(model: nn.Module, task: pm.Task) -> PrecisionMap:
    """Every product in INT8 that is not dead, and that this CPU takes; tables stay."""
    inventory = pm.discover(model, task.forward, task.splits.calibration[0])
    tables = {layer.name for layer in inventory.layers if layer.table or layer.dead}
    chosen = {name: scheme for name, scheme in int8_choice(inventory).items() if name not in tables}
    return calibrated(map_over(inventory, chosen, "cpu-int8", premise_for(model)), task)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _claims(rows: list[Served]) -> list[Claim]:
    packages = [row for row in rows if row.form == PACKAGE]
    claims = [
        at_least(
            "a package as fast as the compiled form, worst", min(row.times_compiled.median for row in packages), 0.9
        ),
        at_most(
            "a package's difference from the compiled form, as a share of the map's own, worst",
            max(row.share_from_compiled for row in packages),
            0.1,
        ),
    ]
    engines = [row for row in rows if row.form in ("onnxruntime", "openvino")]
    if engines:
        worst = max(row.share_of_map for row in engines)
        claims.append(
            at_most("an engine's difference, rest in float32, as a share of the map's own, worst", worst, 1.0)
        )
    return claims


if __name__ == "__main__":
    sys.exit(main())

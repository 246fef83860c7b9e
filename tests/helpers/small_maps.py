"""Maps made by hand, plain and with everything that a search may claim of one."""

from statistics import fmean, stdev
from typing import Any

from torch import nn

from precimap import Task, discover
from precimap.certificate import BOUND_FARTHEST, BlindSpot, Certificate, GuardAnswer, Rounding, Unrepaired
from precimap.fingerprints import modules_of, of_weights
from precimap.layers.inventory import Inventory
from precimap.numerics.schemes import SCHEMES, Scheme
from precimap.precision_map import Decision, Evidence, OfModel, PrecisionMap, Premise, Realignment, Verdict
from precimap.searching.maps.assemble import premise_of
from precimap.task import first_batch


def decision(scheme: str | None = None, **changes: object) -> Decision:
    static = scheme is not None and SCHEMES[scheme].needs_calibration
    fields: dict[str, object] = {
        "scheme": scheme,
        "verdict": Verdict.TOLERANT if scheme else Verdict.SENSITIVE,
        "reason": "measured",
        "shape": (32, 16),
        "ops": ("linear",),
        "contracted": (1,),
        "input_scale": 0.0625 if static else None,
        "input_zero": 3 if static else None,
        "evidence": {
            "fp8": Evidence(drop=1e-4, error=2e-5, lower=6e-5, upper=1.4e-4, n=900, clusters=900, changed=812)
        },
        "flops_share": 0.5,
        "bytes": 2048,
    }
    return Decision(**{**fields, **changes})


PREMISE = Premise(
    weights="w" * 16, task="t", metric="loss", calibration="c", search="s", certify="v", base_precision="float32",
    device="cpu", precimap="0", torch="2",
)  # fmt: skip


def a_map(**layers: Decision) -> PrecisionMap:
    return PrecisionMap(
        target="emulated", schemes={n: s.row() for n, s in SCHEMES.items()}, layers=layers, premise=PREMISE
    )


def a_blind_spot() -> BlindSpot:
    return BlindSpot(
        noun="cluster", looked_at=300, effective=250.0, one_in=84.0, rare="positive", rare_one_in=10.5, cost=0.2,
        unit="nats", weight=None,
    )  # fmt: skip


def certified(example: PrecisionMap, realigned_at: str | None = None) -> PrecisionMap:
    """The map with everything that a search may claim of it."""
    repair, without = None, None
    if realigned_at is not None:
        repair = Realignment(layer=realigned_at, scale=(1.01,), shift=(0.1,), n=90)
        without = Unrepaired(drop=0.003, error=5e-4, upper=0.004)
    every = OfModel(weights_share=0.9, bytes=example.bytes_before + 100)
    plain = example.model_copy(update={"realignment": repair, "of_model": every})
    held = GuardAnswer(
        held=True, drop=-0.002, error=1e-3, upper=0.004, margin=0.005, unit="", baseline=1.0, n=900, clusters=300,
        effective=250.0, needed=None, blind_spot=a_blind_spot(),
    )  # fmt: skip
    found = Certificate(
        metric="loss", certified=True, verdict="certified", claim="codes", drop=0.001, error=4e-4, upper=0.0018,
        margin=0.002, alpha=0.05, spent_alpha=0.05, bound=BOUND_FARTHEST, baseline=0.7, n=1000, clusters=300, changed=812,
        needed=None, effective=250.0, blind_spot=a_blind_spot(), guards={"calibration": held},
        reported={"AUC": (1e-4, 2e-4)}, unrepaired=without, split="v", map=plain.fingerprint,
    )  # fmt: skip
    drops = (0.001, 0.002, 0.0025)
    draws = Rounding(
        shipped=0.001, error_over_units=1e-3, n=128, drops=drops, mean=fmean(drops), sd=stdev(drops), common=1e-4
    )
    return plain.model_copy(update={"certificate": found, "rounding": draws})


def map_of(task: Task, choice: dict[str, str], target: str = "cpu-int8") -> PrecisionMap:
    """A map as a search writes it, of a choice made here."""
    from precimap.searching.splits.three_splits import fingerprint_splits

    inventory = discover(task.model, task.forward, first_batch(task, task.splits.calibration))
    premise = premise_of(task, of_weights(task.model), fingerprint_splits(task), "test")
    return map_over(inventory, choice, target, premise)


def map_over(inventory: Inventory, choice: dict[str, str], target: str, premise: Premise) -> PrecisionMap:
    """The same of an inventory and a premise that are there already."""
    chosen: dict[str, Scheme] = {name: SCHEMES[name] for name in choice.values()}
    return PrecisionMap(
        target=target,
        schemes={name: found.row() for name, found in chosen.items()},
        layers={
            layer.name: Decision(
                scheme=choice.get(layer.name),
                verdict=Verdict.TOLERANT,
                reason="chosen by a test",
                shape=layer.shape,
                ops=layer.ops,
                contracted=layer.contracted,
                **static_range(choice.get(layer.name)),
                bytes=layer.bytes,
                also_read_by=layer.also_read_by,
            )
            for layer in inventory.layers
        },
        premise=premise,
    )


def static_range(scheme: str | None) -> dict[str, Any]:
    """A range of inputs for the schemes that need one."""
    if scheme is None or not SCHEMES[scheme].needs_calibration:
        return {}
    given = SCHEMES[scheme].input
    return {"input_scale": 0.03, "input_zero": 0 if given is None or given.symmetric else 60}


def premise_for(model: nn.Module) -> Premise:
    """Of a map that is bound to this model, and to no data."""
    return PREMISE.model_copy(update={"weights": of_weights(model), "architecture": modules_of(model)})

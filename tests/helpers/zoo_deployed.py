"""What is asked of every model that is deployed, whoever wrote it.

Invariant: nothing here knows a model. What is compared is the model as its owner gave it, the emulation that a search
measures, and what deployment made of them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helpers import zoo_flops
from helpers.going_round import through_pickle, through_torch
from helpers.small_maps import map_over, premise_for
from helpers.specimen import Specimen, run
from helpers.zoo_outside import calls_of, count_calls, names, tensors, untouched
from precimap import CPU_INT8, Splits, Task, deploy, discover, load_deployed, save_deployed
from precimap.layers.emulation import quantized
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import QuantizedLayer, quantize_map
from precimap.layers.refusals import refusal
from precimap.layers.storages import storages_of
from precimap.metrics import Loss
from precimap.numerics.schemes import SCHEMES
from precimap.precision_map import PrecisionMap
from precimap.runtime.deploy import deployment_of
from precimap.runtime.weights.placing import low_weights
from precimap.runtime.x86.target import int8_scheme
from precimap.searching.calibrate import calibrate
from precimap.searching.progress import silent

# What the kernels of a whole model may add to what quantising does to its outputs, rms: in half of the units, and in all
# together. Their sums differ in the last bit, and so an input of a later layer goes to the next code now and then: in a
# small model a part of what quantising does to that unit, and nothing to the others. A deep one ends up anywhere within
# what quantising does, as it does when its biases change in their last bit; then each layer is looked at by itself.
AGREEMENT, MOVED, ALONE = 1e-3, 0.5, 0.05
EMULATED = ("fp8", "int8", "fp8-weight", "fp8-e5m2")


@dataclass(frozen=True)
class Outcome:
    """What was deployed of one model.

    layers: that discovery found. covered: their share of the FLOPs. low: products in INT8. tables: in packed rows. emulated:
    layers of the emulated deployment. added: rms difference of the INT8 model from its emulation, as a share of what
    quantising does. methods: of the library's own, that were called.
    """

    layers: int
    covered: float
    low: int
    tables: int
    emulated: int
    added: float
    methods: tuple[str, ...]


def examined(specimen: Specimen, folder: Path) -> Outcome:
    """All checks. Raises AssertionError, or what a deployment raised."""
    count_calls(specimen.model)
    able = can_generate(specimen)  # and so it ran once, for models that set themselves up
    specimen()
    with untouched(specimen.model):
        inventory = accounted(specimen)
        task, premise = task_of(specimen), premise_for(specimen.model)
        int8 = calibrated(map_over(inventory, int8_choice(inventory), "cpu-int8", premise), task)
        fast = deploy(specimen.model, int8, task=task)
        added = agrees(specimen, fast, int8)
        lives_on(specimen, fast)
        read_again(specimen, fast, folder / "int8.safetensors")
        methods = answers(specimen, fast, able)
        choice = emulated_choice(inventory)
        other = map_over(inventory, choice, "emulated", premise)
        emulated = deploy(specimen.model, other)
        layers = quantize_map(specimen.model, other)
        same_bits(specimen, emulated, layers, inventory)
        if able:
            generates_as(specimen, emulated, layers)
        read_again(specimen, emulated, folder / "emulated.safetensors")
    low = low_weights(fast)
    tables = sum(weight.how.scheme.rows is not None for weight in low.values())
    return Outcome(len(inventory.layers), inventory.covered, len(low) - tables, tables, len(choice), added, methods)


def task_of(specimen: Specimen) -> Task:
    """One batch, which is every split; the loss is read by nobody."""
    batch = specimen.batch
    return Task(
        specimen.model,
        splits=Splits([batch], [batch], [batch]),
        forward=specimen.forward,
        loss=lambda scores, _: scores.float().square().reshape(len(scores), -1).mean(1),
        metric=Loss(),
    )


def accounted(specimen: Specimen) -> Inventory:
    """Every FLOP that torch counts and every parameter is in the inventory."""
    inventory = discover(specimen.model, specimen.forward, specimen.batch)
    # Torch's counter wants a history of every parameter that requires a gradient and is handed from module to module.
    frozen = replace(specimen, model=copy.deepcopy(specimen.model).requires_grad_(False))
    counted = sum(zoo_flops.count(frozen).values())
    assert inventory.flops == counted, f"{inventory.flops} FLOPs accounted for, torch counts {counted}"
    assert inventory.parameters == sum(parameter.numel() for parameter in specimen.model.parameters())
    return inventory


def int8_choice(inventory: Inventory) -> dict[str, str]:
    """Every layer that this CPU takes in INT8, and every table in packed rows."""
    chosen = {}
    for layer in inventory.layers:
        name = "int8-row" if layer.table else int8_scheme()
        if refusal(layer, SCHEMES[name]) is None and CPU_INT8.refusal(layer, SCHEMES[name]) is None:
            chosen[layer.name] = name
    return chosen


def emulated_choice(inventory: Inventory) -> dict[str, str]:
    """Every layer in some scheme that it can take, in turns; tables in rows of 8 and of 4 bits."""
    chosen = {}
    for number, layer in enumerate(inventory.layers):
        turn = number % len(EMULATED)
        names = ("int8-row", "int4-row")[number % 2 :] if layer.table else (*EMULATED[turn:], *EMULATED[:turn])
        taken = [name for name in names if refusal(layer, SCHEMES[name]) is None]
        if taken:
            chosen[layer.name] = taken[0]
    return chosen


def calibrated(precision_map: PrecisionMap, task: Task) -> PrecisionMap:
    """The map with the input ranges that the task's own batch gives."""
    static = [name for name in precision_map.low if precision_map.layers[name].input_scale is not None]
    seen, layers = calibrate(task, tuple(static), silent), dict(precision_map.layers)
    for name in static:
        found = seen.input_range(name, SCHEMES[int8_scheme()])
        assert found is not None
        layers[name] = layers[name].model_copy(update={"input_scale": found.scale, "input_zero": found.zero})
    return precision_map.model_copy(update={"layers": layers})


def agrees(specimen: Specimen, fast: nn.Module, int8: PrecisionMap) -> float:
    """The INT8 model computes what its emulation does, and that is not what the base model computes."""
    agreement = deployment_of(fast).agreement
    assert agreement is not None
    base, layers = specimen(), quantize_map(specimen.model, int8)
    emulation = under(specimen, layers)
    assert set(low_weights(fast)) == set(layers)
    if not layers:
        return 0.0
    assert rms(emulation, base) > 0, "quantising changes nothing"
    added = agreement.rms_difference / rms(emulation, base)
    if added > MOVED or by_half(run(specimen, fast), emulation) > AGREEMENT * rms(emulation, base):
        assert added < 2**0.5, f"the kernels add {added:.2g} of what quantising does"
        for name, layer in layers.items():
            agrees_alone(specimen, base, {name: layer})
    return added


def agrees_alone(specimen: Specimen, base: Tensor, layers: dict[str, QuantizedLayer]) -> None:
    found = run(specimen, CPU_INT8.deployed(specimen.model, layers))
    emulation = under(specimen, layers)
    changed, added = rms(emulation, base), rms(found, emulation)
    lost = 1e-6 * float(base.double().square().mean().sqrt())  # in float32 sums; some layers hardly change an output
    said = f"{', '.join(layers)}: the kernel adds {added:.2g}, quantising changes {changed:.2g}"
    assert added <= ALONE * changed + lost, said


def rms(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).square().mean().sqrt())


def by_half(found: Tensor, expected: Tensor) -> float:
    """The rms difference that half of the units do not exceed."""
    squares = (found.double() - expected.double()).square().reshape(len(expected), -1)
    return float(squares.mean(1).sqrt().median())


def under(specimen: Specimen, layers: dict[str, QuantizedLayer]) -> Tensor:
    with quantized(specimen.model, layers):
        return specimen()


def same_bits(specimen: Specimen, emulated: nn.Module, layers: dict[str, QuantizedLayer], inventory: Inventory) -> None:
    """But for last bits where the model calls einsum and its like, which only the emulation of the search sees as such."""
    found, expected = run(specimen, emulated), under(specimen, layers)
    assert set(low_weights(emulated)) == set(layers)
    difference = float((found.double() - expected.double()).abs().max())
    others = any({"einsum", "tensordot", "inner"} & set(layer.ops) for layer in inventory.layers)
    inside = 1e-5 * float(expected.abs().max()) if others else 0.0
    assert difference <= inside, f"the emulated deployment is {difference:.2g} from the emulation"


def lives_on(specimen: Specimen, fast: nn.Module) -> None:
    """Names, ties, hooks, state, copies: as of any other model."""
    expected = run(specimen, fast)
    assert names(fast) == names(specimen.model)
    assert not set(storages_of(tensors(fast))) & set(storages_of(tensors(specimen.model)))
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert [type(module) for module in fast.modules()] == [type(module) for module in specimen.model.modules()]
    given, own = calls_of(specimen, copy.deepcopy(specimen.model)), calls_of(specimen, fast)  # a copy may lose some
    assert given == own, f"hooks were called {given}, are called {own}"
    state = fast.state_dict()
    assert list(state) == list(specimen.model.state_dict())
    assert str(fast.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(run(specimen, fast), expected)
    with torch.inference_mode():
        assert torch.equal(run(specimen, fast), expected)
    for how in (copy.deepcopy, through_pickle, through_torch):
        try:
            again = how(fast)
        except RuntimeError:
            if can_be(how, specimen.model):
                raise
            continue
        assert names(again) == names(fast)
        assert torch.equal(run(specimen, again), expected), f"a copy by {how} computes something else"


def can_be(how: Callable[[nn.Module], nn.Module], model: nn.Module) -> bool:
    """Whether the model itself can be copied so; one with parametrisations cannot be pickled."""
    try:
        how(model)
    except RuntimeError:
        return False
    return True


def read_again(specimen: Specimen, fast: nn.Module, path: Path) -> None:
    """Saved, and loaded into a tree whose weights are zeros."""
    save_deployed(fast, specimen.model, path)
    skeleton = copy.deepcopy(specimen.model)
    with torch.no_grad():
        for value in skeleton.state_dict().values():
            if value.is_floating_point():
                value.zero_()
    loaded = load_deployed(skeleton, path)
    assert names(loaded) == names(fast)
    assert torch.equal(run(specimen, loaded), run(specimen, fast)), "what was loaded computes something else"


def answers(specimen: Specimen, fast: Any, able: bool) -> tuple[str, ...]:
    """Methods that foreign code calls; those which the model has."""
    called, expected = [], run(specimen, fast)
    given = input_embeddings(specimen.model)
    if given is not None:
        own = fast.get_input_embeddings()
        assert type(own) is type(given)
        assert any(own is module for module in fast.modules())
        assert own.weight.shape == given.weight.shape
        called.append("get_input_embeddings")
    if hasattr(fast, "tie_weights"):
        fast.tie_weights()
        assert names(fast) == names(specimen.model)
        assert torch.equal(run(specimen, fast), expected), "tying again changes what is computed"
        called.append("tie_weights")
    if able:
        assert generated(specimen, fast).shape[0] == len(specimen.batch["input_ids"])
        called.append("generate")
    return tuple(called)


def input_embeddings(model: Any) -> nn.Module | None:
    """None of a model that has none, or several."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if hasattr(found, "weight") else None


def takes_ids(specimen: Specimen) -> bool:
    return isinstance(specimen.batch, dict) and "input_ids" in specimen.batch


def can_generate(specimen: Specimen) -> bool:
    """Whether the model itself can, of the sizes that it has here."""
    able = getattr(specimen.model, "can_generate", None)
    if not takes_ids(specimen) or able is None or not able():
        return False
    try:
        generated(specimen, specimen.model)
    except RuntimeError:
        return False
    return True


def generated(specimen: Specimen, model: Any) -> Tensor:
    tokens: Tensor = model.generate(specimen.batch["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    return tokens


def generates_as(specimen: Specimen, emulated: nn.Module, layers: dict[str, QuantizedLayer]) -> None:
    """Token for token what the model generates under the emulation: through its cache, one position at a time."""
    found = generated(specimen, emulated)
    with quantized(specimen.model, layers):
        assert torch.equal(found, generated(specimen, specimen.model))

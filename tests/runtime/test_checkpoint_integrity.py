"""A checkpoint computes what was saved, or does not load: turned bits, values that no layer has, names too many."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from precimap import PrecisionMap, deploy, load_deployed, save_deployed
from precimap.errors import MapError, UncertifiedMapWarning
from precimap.fingerprints import of_weights
from precimap.layers.discover import discover
from precimap.numerics.schemes import SCHEMES
from precimap.precision_map import Decision, Premise, Verdict
from precimap.runtime.checkpoint import DIGEST_KEY, METADATA_KEY, _digest

pytestmark = pytest.mark.filterwarnings("ignore:this map is not certified")

CHOICE = {
    "table.weight": "int4-row", "wide.weight": "int8-row", "first.weight": "fp8", "second.weight": "int8-static",
    "third.weight": "fp8-tensor",
}  # fmt: skip
IDS = torch.arange(24).reshape(12, 2) % 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.wide = nn.Embedding(20, 16), nn.Embedding(20, 16)
        self.first, self.second, self.third = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16)
        self.norm, self.last = nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.table(ids[:, 0]), self.wide(ids[:, 1])], dim=1)
        out: Tensor = self.last(self.norm(self.third(self.second(self.first(x).relu()).relu())))
        return out


def net() -> Net:
    torch.manual_seed(4)
    return Net().eval()


def hand_made(model: nn.Module) -> PrecisionMap:
    inventory = discover(model, lambda m, ids: m(ids), IDS)
    layers = {}
    for layer in inventory.layers:
        scheme = CHOICE.get(layer.name)
        static = scheme is not None and SCHEMES[scheme].needs_calibration
        layers[layer.name] = Decision(
            scheme=scheme, verdict=Verdict.UNDECIDED, reason="by hand", shape=layer.shape, ops=layer.ops,
            contracted=layer.contracted, input_scale=0.05 if static else None, input_zero=3 if static else None,
        )  # fmt: skip
    premise = Premise(
        weights=of_weights(model), task="t", metric="loss", calibration="c", search="s", certify="v",
        base_precision="float32", device="cpu", precimap="0", torch="2",
    )  # fmt: skip
    schemes = {name: SCHEMES[name].row() for name in CHOICE.values()}
    return PrecisionMap(target="emulated", schemes=schemes, layers=layers, premise=premise)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, model = tmp_path_factory.mktemp("checkpoint") / "model.safetensors", net()
    with pytest.warns(UncertifiedMapWarning):
        save_deployed(deploy(model, hand_made(model)), model, path)
    return path


def computed(path: Path) -> Tensor:
    with torch.no_grad():
        return load_deployed(net(), path)(IDS)


def test_it_computes_what_was_saved(saved: Path) -> None:
    model = net()
    with torch.no_grad():
        assert torch.equal(computed(saved), deploy(model, hand_made(model))(IDS))


def test_a_flipped_bit_is_found_wherever_it_is(saved: Path, tmp_path: Path) -> None:
    """60 anywhere, and 60 in the header, where the map and the names are."""
    whole, chance, path = saved.read_bytes(), random.Random(60), tmp_path / "flipped.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [chance.randrange(len(whole)) for _ in range(60)] + [chance.randrange(header) for _ in range(60)]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(MapError):
            load_deployed(net(), path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 500, -1, -100])
def test_a_file_that_was_cut_is_found(saved: Path, tmp_path: Path, length: int) -> None:
    (tmp_path / "cut.safetensors").write_bytes(saved.read_bytes()[:length])
    with pytest.raises(MapError):
        load_deployed(net(), tmp_path / "cut.safetensors")


def rewritten(saved: Path, path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """The file as another program would write it that knows how a digest is made."""
    with safe_open(saved, framework="pt") as file:
        text = file.metadata()[METADATA_KEY]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save(tensors, {METADATA_KEY: text, DIGEST_KEY: _digest(tensors, text)}))


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: make(tensors[name].clone())})


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def at_first(value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return make


def nan_code(codes: Tensor) -> Tensor:
    codes.view(torch.uint8).view(-1)[5] = 0x7F
    return codes


WRONG = {
    "a scale that is NaN": (put("first.weight.scale", at_first(float("nan"))), "its scale holds NaN or infinity"),
    "a scale that is infinite": (put("second.weight.scale", at_first(float("inf"))), "its scale holds NaN or infinity"),
    "a scale below zero": (put("third.weight.scale", at_first(-1.0)), "expected scales above zero, got -1"),
    "a scale of zero": (put("first.weight.scale", at_first(0.0)), "expected scales above zero, got 0"),
    "an offset that is NaN": (put("table.weight.offset", at_first(float("nan"))), "its offset holds NaN"),
    "one scale for all channels": (put("first.weight.scale", lambda s: s[:1]), "expected scale torch.float32 (32, 1)"),
    "scales along the other dim": (put("first.weight.scale", lambda s: s.T), "expected scale torch.float32 (32, 1)"),
    "scales of a half": (put("second.weight.scale", lambda s: s.half()), "got torch.float16"),
    "a scale for each row": (put("third.weight.scale", lambda s: s.expand(16, 1)), "expected scale torch.float32 (1, 1)"),
    "codes of another type": (put("second.weight.codes", lambda c: c.to(torch.uint8)), "expected codes torch.int8"),
    "codes of another shape": (put("second.weight.codes", lambda c: c[:16]), "expected codes torch.int8 (32, 32)"),
    "a code that INT8 leaves out": (put("second.weight.codes", at_first(-128)), "codes that int8 does not have"),
    "a code beyond four bits": (put("table.weight.codes", at_first(16)), "codes that uint4 does not have"),
    "a code that is NaN": (put("first.weight.codes", nan_code), "codes that e4m3 does not have"),
    "a bias of another type": (put("first.bias", lambda b: b.half()), "first.bias: the model has torch.float32 (32,)"),
    "a bias of a double": (put("first.bias", lambda b: b.double()), "the file torch.float64"),
    "statistics of another type": (put("norm.running_var", lambda v: v.bfloat16()), "norm.running_var"),
    "a count of another type": (put("norm.num_batches_tracked", lambda v: v.float()), "norm.num_batches_tracked"),
    "a bias of another size": (put("last.bias", lambda b: b[:3]), "the model has torch.float32 (4,)"),
    "a bias that is missing": (without("last.bias"), "the model has last.bias, the file has not"),
    "codes that are missing": (without("first.weight.codes"), "codes is missing or too many"),
    "a scale that is missing": (without("wide.weight.scale"), "scale is missing or too many"),
    "an offset that is missing": (without("wide.weight.offset"), "offset is missing or too many"),
    "a zero too many": (lambda t: t.update({"first.weight.zero": torch.zeros(32, 1)}), "zero is missing or too many"),
    "an offset too many": (lambda t: t.update({"first.weight.offset": torch.zeros(32, 1)}), "offset is missing"),
    "the weight beside its codes": (lambda t: t.update({"first.weight": torch.zeros(32, 32)}), "it has first.weight"),
    "a tensor of nobody": (lambda t: t.update({"nobody": torch.zeros(1)}), "it has nobody, the model has not"),
    "codes of a layer that is not low": (
        lambda t: t.update({"last.weight.codes": torch.zeros(4, 16, dtype=torch.int8)}), "it has last.weight.codes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_no_layer_has_is_refused_whatever_the_digest(case: str, saved: Path, tmp_path: Path) -> None:
    change, said = WRONG[case]
    path = tmp_path / "wrong.safetensors"
    rewritten(saved, path, change)
    with pytest.raises(MapError, match=re.escape(said)):
        load_deployed(net(), path)


def test_the_rewriting_of_these_tests_is_right(saved: Path, tmp_path: Path) -> None:
    rewritten(saved, tmp_path / "same.safetensors", lambda tensors: None)
    assert torch.equal(computed(tmp_path / "same.safetensors"), computed(saved))


def test_what_fits_in_another_place_is_known_by_the_digest(saved: Path, tmp_path: Path) -> None:
    """Scales swapped within a layer and between two tables: each fits where it is."""
    with safe_open(saved, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    swapped = {
        "within": {**tensors, "first.weight.scale": tensors["first.weight.scale"].flip(0).contiguous()},
        "between": {
            **tensors,
            "table.weight.scale": tensors["wide.weight.scale"],
            "wide.weight.scale": tensors["table.weight.scale"],
        },
    }
    for name, contents in swapped.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(save(contents, metadata))
        with pytest.raises(MapError, match="its digest is of other tensors"):
            load_deployed(net(), path)
    path.write_bytes(save(tensors, {METADATA_KEY: metadata[METADATA_KEY]}))
    with pytest.raises(MapError, match="or is from before digests were written"):
        load_deployed(net(), path)


def test_the_architecture_has_the_precision_that_was_saved(saved: Path) -> None:
    with pytest.raises(
        MapError, match=r"the model has torch\.bfloat16 .*, the file torch\.float32 .*precision in which it"
    ):
        load_deployed(net().bfloat16(), saved)


def test_an_uncertified_map_is_told_when_it_is_deployed_and_when_it_is_loaded(saved: Path) -> None:
    with pytest.warns(
        UncertifiedMapWarning, match=r"this map is not certified: it has no certificate\. Nothing bounds"
    ) as told:
        load_deployed(net(), saved)
    assert told[0].filename == __file__, "the warning points at the caller"

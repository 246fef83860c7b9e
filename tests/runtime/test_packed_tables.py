"""Packed embedding tables on the CPU: torch's operators against the emulation, in every mode that they serve."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.small_maps import map_of
from precimap import CPU_INT8, PrecisionMap, Splits, Task, deploy, load_deployed, save_deployed
from precimap.errors import DeployError
from precimap.layers.discover import discover
from precimap.layers.emulation import quantized
from precimap.layers.quantized import QuantizedLayer, quantize_layer
from precimap.layers.refusals import refusal
from precimap.metrics import Loss
from precimap.numerics.schemes import scheme
from precimap.runtime import deploy as deploying
from precimap.runtime.deploy import deployed_layers, deployment_of
from precimap.runtime.weights.placing import low_weights
from precimap.runtime.x86 import rows as packed_rows
from precimap.runtime.x86.int8 import INT8_KERNEL
from precimap.runtime.x86.rows import ROWS_KERNEL
from precimap.runtime.x86.target import int8_scheme

ROWS = ("int8-row", "int4-row")
GENERATOR = torch.Generator().manual_seed(11)


pytestmark = pytest.mark.filterwarnings("ignore:this map is not certified")  # they are made by hand


def layer_of(module: nn.Module, name: str, of: str = "weight") -> dict[str, QuantizedLayer]:
    return {of: quantize_layer(of, dict(module.named_parameters())[of], (1,), scheme(name), None)}


def both(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What the packed module returns, and what the emulation of the plain one does."""
    layers = layer_of(module, name)
    packed = CPU_INT8.deployed(module, layers)
    assert type(packed) is type(module)
    assert packed.weight.how.kernel is ROWS_KERNEL
    with torch.no_grad(), quantized(module, layers):
        expected = module(*args, **kwargs)
    with torch.no_grad():
        found = packed(*args, **kwargs)
        assert not torch.allclose(expected, module(*args, **kwargs), atol=1e-5), "the emulation changes something"
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    return found, expected


@pytest.mark.parametrize("whole", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), ()])
def test_a_lookup_has_the_bits_of_the_emulation(shape: tuple[int, ...], name: str, whole: torch.dtype) -> None:
    module = nn.Embedding(50, 12, padding_idx=3)
    ids = torch.randint(50, shape, generator=GENERATOR).to(whole)
    found, expected = both(module, name, ids)
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)


def test_no_ids_give_no_rows() -> None:
    packed = CPU_INT8.deployed(nn.Embedding(5, 4), layer_of(nn.Embedding(5, 4), "int8-row"))
    assert packed(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 4)


IDS = torch.randint(50, (20,), generator=GENERATOR)
BAGS = torch.tensor([0, 4, 4, 9, 19])  # one of them empty
TABLE_IDS = torch.randint(50, (6, 5), generator=GENERATOR)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 0, -1])
@pytest.mark.parametrize("how", ["offsets", "last offset", "two dims"])
def test_bags_are_those_of_the_emulation(how: str, padding: int | None, mode: str, name: str) -> None:
    module = nn.EmbeddingBag(50, 12, mode=mode, padding_idx=padding, include_last_offset=how == "last offset")
    ids, offsets = IDS.clone(), BAGS
    ids[[1, 5, 6, 7, 8]] = 0 if padding is None else padding % 50  # a whole bag of padding among them
    args: tuple[Tensor, ...] = (ids, offsets)
    if how == "last offset":
        args = (ids, torch.cat([offsets, torch.tensor([20])]))
    elif how == "two dims":
        args = (torch.where(TABLE_IDS < 9, 0 if padding is None else padding % 50, TABLE_IDS),)
    found, expected = both(module, name, *args)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("flat", [True, False])
def test_samples_have_weights(flat: bool, padding: int | None, name: str) -> None:
    module = nn.EmbeddingBag(50, 12, mode="sum", padding_idx=padding)
    ids = IDS if flat else TABLE_IDS
    weights = torch.randn(ids.shape, generator=GENERATOR)
    arguments: dict[str, Any] = {"per_sample_weights": weights, **({"offsets": BAGS} if flat else {})}
    found, expected = both(module, name, ids, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_results_keep_the_base_precision(dtype: torch.dtype, name: str) -> None:
    for module, args in ((nn.Embedding(50, 12), (TABLE_IDS,)), (nn.EmbeddingBag(50, 12, mode="sum"), (TABLE_IDS,))):
        found, expected = both(module.to(dtype), name, *args)
        torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-3)


def test_wrong_calls_are_refused_and_not_answered() -> None:
    bag = nn.EmbeddingBag(50, 12, mode="mean")
    packed = CPU_INT8.deployed(bag, layer_of(bag, "int8-row"))
    for args, error, message in (
        ((IDS,), ValueError, "offsets has to be a 1D Tensor"),
        ((TABLE_IDS, BAGS), ValueError, "offsets has to be None"),
        ((IDS, BAGS, torch.ones(20)), NotImplementedError, "only supported for mode='sum'"),
        ((IDS, BAGS + 1), ValueError, "first offset"),
    ):
        with pytest.raises(error, match=message):
            packed(*args)
    for wrong in (50, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            packed(torch.tensor([[0, wrong]]))


class Ranker(nn.Module):
    """Two tables, one of them pooled, before two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.history = nn.Embedding(200, 16), nn.EmbeddingBag(400, 16, mode="mean")
        self.hidden, self.last = nn.Linear(32, 64), nn.Linear(64, 1)

    def forward(self, user: Tensor, history: Tensor) -> Tensor:
        both = torch.cat([self.user(user), self.history(history)], dim=-1)
        scores: Tensor = self.last(torch.relu(self.hidden(both))).squeeze(-1)
        return scores


def ranker() -> Ranker:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Ranker().eval()


def ranker_batch(n: int = 30) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {
        "user": torch.randint(200, (n,), generator=generator),
        "history": torch.randint(400, (n, 6), generator=generator),
        "labels": torch.ones(n),
    }


def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model(batch["user"], batch["history"])
    return scores


def task_of(model: nn.Module) -> Task:
    splits = Splits(*([ranker_batch(n)] for n in (30, 40, 50)))
    return Task(model, splits=splits, forward=run, loss=lambda s, b: (s - b["labels"]).square(), metric=Loss())


def mixed_map(task: Task, target: str = "cpu-int8") -> PrecisionMap:
    return map_of(
        task, {"user.weight": "int4-row", "history.weight": "int8-row", "hidden.weight": int8_scheme()}, target
    )


def test_a_mixed_map_is_one_model(tmp_path: Path) -> None:
    task = task_of(ranker())
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    fast = deploy(task.model, mixed_map(task), task=task)
    kernels = {name: weight.how.kernel for name, weight in low_weights(fast).items()}
    assert kernels == {"user.weight": ROWS_KERNEL, "history.weight": ROWS_KERNEL, "hidden.weight": INT8_KERNEL}
    assert [type(part) for part in fast.children()] == [nn.Embedding, nn.EmbeddingBag, nn.Linear, nn.Linear]
    found = deployment_of(fast).agreement
    assert found is not None
    assert found.relative < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
    with torch.no_grad():
        emulated = deploy(task.model, mixed_map(task), target="emulated")
        assert not torch.allclose(run(emulated, ranker_batch()), run(task.model, ranker_batch()), atol=1e-4)


def test_the_rows_are_all_that_is_kept() -> None:
    task = task_of(ranker())
    fast = deploy(task.model, mixed_map(task))
    assert {name: part.shape for name, part in fast.user.weight.parts.items()} == {"rows": (200, 16 // 2 + 4)}
    assert {name: part.shape for name, part in fast.history.weight.parts.items()} == {"rows": (400, 16 + 8)}
    assert set(fast.user.state_dict()) == {"weight"}
    assert fast.user.weight.shape == (200, 16)
    assert fast.user.weight.dtype == torch.float32


def test_codes_come_back_from_the_rows() -> None:
    task = task_of(ranker())
    fast = deploy(task.model, mixed_map(task))
    for name in ("user.weight", "history.weight"):
        given = dict(task.model.named_parameters())[name]
        scheme_of = mixed_map(task).scheme_of(name)
        assert scheme_of is not None
        expected, found = quantize_layer(name, given, (1,), scheme_of, None), deployed_layers(fast)[name]
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.weight(), expected.weight())


def test_a_checkpoint_of_tables_computes_the_same_bits(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    task, path = task_of(ranker()), tmp_path / "model.safetensors"
    fast = deploy(task.model, mixed_map(task))
    save_deployed(fast, task.model, path)
    tensors = load_file(path)
    assert tensors["user.weight.codes"].shape == (200, 16)
    assert tensors["user.weight.offset"].shape == (200, 1)
    assert "user.weight" not in tensors
    skeleton = Ranker().eval()
    loaded = load_deployed(skeleton, path)
    with torch.no_grad():
        assert torch.equal(run(loaded, ranker_batch()), run(fast, ranker_batch()))
    assert torch.equal(loaded.user.weight.parts["rows"], fast.user.weight.parts["rows"])
    with torch.no_grad():
        emulated = load_deployed(skeleton, path, target="emulated")
        torch.testing.assert_close(run(emulated, ranker_batch()), run(fast, ranker_batch()), rtol=1e-5, atol=1e-5)
    save_deployed(loaded, task.model, tmp_path / "again.safetensors")  # from rows to codes once more
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "again.safetensors").items())


@pytest.mark.parametrize("name", ROWS)
def test_packed_tables_are_copied_pickled_and_exported(name: str) -> None:
    table, ids = nn.Embedding(50, 12), torch.tensor([4, 7, 49])
    packed = CPU_INT8.deployed(table, layer_of(table, name))
    exported = torch.export.export(packed, (ids,)).module()
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), exported):
        assert torch.equal(again(ids), packed(ids))
    other = CPU_INT8.deployed(nn.Embedding(50, 12), layer_of(nn.Embedding(50, 12), name))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(ids), packed(ids))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_computes_the_same(backend: str) -> None:
    task = task_of(ranker())
    fast = deploy(task.model, mixed_map(task))
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):  # without it the INT8 layers end the graph
        compiled = torch.compile(fast, backend=backend, fullgraph=True)
        torch.testing.assert_close(run(compiled, ranker_batch()), run(fast, ranker_batch()))


def test_an_operator_that_reads_rows_wrongly_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(ranker())
    plain = packed_rows.lookup
    monkeypatch.setattr(packed_rows, "lookup", lambda *a: plain(*a) * (1 + 1e-3))
    with pytest.raises(DeployError, match=r"user\.weight: the operator reads rows that differ"):
        deploying.deploy(task.model, mixed_map(task))


def test_a_bag_that_adds_wrongly_shows_in_the_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(ranker())
    monkeypatch.setattr("precimap.runtime.x86.rows._counts", lambda *_: torch.tensor(5.0).reshape(1))
    found = deployment_of(deploy(task.model, mixed_map(task), task=task)).agreement
    assert found is not None
    assert found.relative > 1e-3


def test_a_table_that_computes_low_elsewhere_is_refused() -> None:
    model, batch = ranker(), ranker_batch()
    inventory = discover(model, run, batch)
    table, linear = inventory.layer("user.weight"), inventory.layer("hidden.weight")
    assert refusal(table, scheme("int8-row")) is None
    assert CPU_INT8.refusal(table, scheme("int4-row")) is None
    assert "float32 scales" in str(CPU_INT8.refusal(table, scheme("int8-row-half")))
    assert "for embedding tables" in str(refusal(linear, scheme("int8-row")))
    assert "lookup has no input" in str(refusal(table, scheme("fp8")))
    assert "takes packed rows" in str(CPU_INT8.refusal(table, scheme("fp8-weight")))


class Odd(nn.Module):
    """Tables that packed rows cannot serve, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Embedding(40, 15)
        self.narrow = nn.Embedding(40, 2)
        self.largest = nn.EmbeddingBag(40, 16, mode="max")
        self.bounded = nn.Embedding(40, 16, max_norm=1.0)
        self.raw = nn.Parameter(torch.randn(40, 16))
        self.both = nn.Embedding(40, 16)
        self.read = nn.Embedding(40, 16)
        self.first = nn.Embedding(40, 16)
        self.second = nn.Embedding(40, 16)
        self.second.weight = self.first.weight
        self.columns = nn.Parameter(torch.randn(16, 40))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.largest(ids[:, None]) + self.bounded(ids) + nn.functional.embedding(ids, self.raw)
        rows = rows + self.first(ids) + self.second(ids) + self.read(ids) * self.read.weight.square().mean()
        rows = rows + nn.functional.embedding(ids, self.columns.t())
        return (
            self.both(ids) @ self.both.weight.t()
            + rows.sum(1, keepdim=True)
            + (self.odd(ids).sum(1) + self.narrow(ids).sum(1)).unsqueeze(1)
        )


@pytest.mark.parametrize(
    ("table", "name", "reason"),
    [
        ("odd.weight", "int4-row", "an even width; its width is 15"),
        ("odd.weight", "int8-row", None),
        ("narrow.weight", "int8-row", "no fewer than its 320"),
        ("narrow.weight", "int4-row", None),
        ("largest.weight", "int8-row", None),
        ("bounded.weight", "int8-row", "max_norm"),
        ("raw", "int8-row", None),
        ("both.weight", "int8-row", "also multiplied"),
        ("read.weight", "int8-row", "also read by square"),
        ("first.weight", "int8-row", None),
        ("columns", "int8-row", "rows do not lie along the last dim"),
    ],
)
def test_what_packed_rows_cannot_serve_is_refused(table: str, name: str, reason: str | None) -> None:
    model = Odd().eval()
    ids = torch.arange(30)
    inventory = discover(model, lambda m, b: m(b), ids)
    layer = inventory.layer(table)
    found = refusal(layer, scheme(name)) or CPU_INT8.refusal(layer, scheme(name))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("padding", [None, 3])
def test_the_largest_of_its_rows(padding: int | None, name: str) -> None:
    """What the operators do not have: over decoded rows."""
    module = nn.EmbeddingBag(50, 12, mode="max", padding_idx=padding)
    found, expected = both(module, name, TABLE_IDS)
    assert torch.equal(found, expected)


def test_tied_and_raw_tables_are_looked_up_under_all_their_names() -> None:
    model, ids = Odd().eval(), torch.arange(30)
    weights = dict(model.named_parameters())
    layers = {n: quantize_layer(n, weights[n], (1,), scheme("int8-row"), None) for n in ("raw", "first.weight")}
    fast = CPU_INT8.deployed(model, layers)
    assert fast.second.weight is fast.first.weight
    with torch.no_grad():
        found = fast(ids)
        with quantized(model, layers):
            expected = model(ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_rows_are_decoded_for_whoever_reads_them_otherwise() -> None:
    table = nn.Embedding(9, 4)
    packed = CPU_INT8.deployed(table, layer_of(table, "int8-row"))
    values = packed.weight.layer().weight()
    with torch.no_grad():
        assert torch.equal(packed.weight + 1, values + 1)
        assert torch.equal(packed.weight[torch.tensor([3, 1])], values[[3, 1]])
        assert torch.equal(packed.weight.t() @ torch.ones(9), values.t() @ torch.ones(9))
        torch.testing.assert_close(nn.functional.linear(torch.ones(2, 4), packed.weight), torch.ones(2, 4) @ values.t())


def test_a_map_cannot_get_past_the_refusal() -> None:
    bounded = nn.Embedding(9, 4, max_norm=0.1)
    packed = CPU_INT8.deployed(bounded, layer_of(bounded, "int8-row"))
    with pytest.raises(DeployError, match="weight: its codes cannot be written"):
        packed(torch.tensor([1]))
    with pytest.raises(DeployError, match="float32 scales"):
        CPU_INT8.deployed(nn.Embedding(9, 4), layer_of(nn.Embedding(9, 4), "int8-row-half"))

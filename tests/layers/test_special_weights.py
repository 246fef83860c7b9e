"""Weights of other kinds, computed weights, transforms: discovered, or refused by name with what to do."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precimap.errors import ModelError
from precimap.layers.discover import discover
from precimap.layers.emulation import quantized
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import quantize_layer
from precimap.numerics.schemes import scheme

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))


def of(model: nn.Module, forward: Callable[[Any, Any], Tensor] = lambda m, b: m(b)) -> Inventory:
    return discover(model.eval(), forward, X)


class Weighed(nn.Module):
    """x @ (something of w and a buffer), then a layer."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(32, 32)), nn.Linear(32, 16)
        self.register_buffer("basis", torch.randn(32, 32))
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.compute(self.w, self.basis))


def old_style(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(linear)


COMPUTED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {  # model, the parameter, what is said of it
    "spectral_norm": (
        lambda: nn.Sequential(old_style(nn.Linear(32, 64, bias=False)), nn.ReLU(), nn.Linear(64, 16)),
        "0.weight_orig",
        "linear reads a tensor computed from it by",
    ),
    "parametrizations.spectral_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(32, 64)), nn.ReLU(), nn.Linear(64, 16)),
        "0.parametrizations.weight.original",
        "linear reads a tensor computed from it by",
    ),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 64)), nn.Linear(64, 16)),
        "0.parametrizations.weight.original1",
        "linear reads a tensor computed from it by _weight_norm",
    ),
    "mixed with a basis": (
        lambda: Weighed(lambda w, b: b @ w),
        "w",
        "matmul reads a tensor computed from it by matmul",
    ),
    "a view of the basis": (
        lambda: Weighed(lambda w, b: w @ b.clone().t()),
        "w",
        "matmul reads a tensor computed from it",
    ),
    "by mm": (lambda: Weighed(lambda w, b: torch.mm(w.t(), b) / 3), "w", "matmul reads a tensor computed from it by"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_first_is_no_layer(name: str) -> None:
    build, parameter, said = COMPUTED[name]
    inventory = of(build())
    (layer,) = inventory.layers
    assert layer.name in ("2.weight", "1.weight", "head.weight")
    (reason,) = [other.reason for other in inventory.others if other.name == parameter]
    assert said in reason
    assert inventory.hidden_flops
    assert inventory.covered < 0.5


def test_spectral_norm_in_training_is_computed_too() -> None:
    """The power iteration writes its buffers, from parameters and buffers alone."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(32, 64)), nn.Linear(64, 16)).train()
    inventory = discover(model, lambda m, b: m(b), X)
    assert [layer.name for layer in inventory.layers] == ["1.weight"]


class Workspace(nn.Module):
    """A buffer that is written with the batch is an input like any other, by whichever call and view it is written."""

    def __init__(self, write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.register_buffer("space", torch.zeros(8, 32), persistent=False)
        self.layer = nn.Linear(32, 16)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.space, x)
        return self.layer(self.space)


@pytest.mark.parametrize(
    "write",
    [
        lambda space, x: space.copy_(x),
        lambda space, x: space[:].copy_(x),
        lambda space, x: space.__setitem__(slice(0, 8), x),
        lambda space, x: torch.mul(x, 2, out=space),
        lambda space, x: space.zero_().add_(x),
    ],
)
def test_a_buffer_that_holds_the_batch_is_an_input(write: Callable[[Tensor, Tensor], object]) -> None:
    assert [layer.name for layer in of(Workspace(write)).layers] == ["layer.weight"]


def test_positions_in_a_buffer_are_looked_up_as_ever() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ids", torch.arange(32))
            self.table, self.head = nn.Embedding(32, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x[..., None] * self.table(self.ids)).mean(1)

    assert {layer.name for layer in of(Positions()).layers} == {"table.weight", "head.weight"}


def test_a_weight_that_meets_a_buffer_and_the_batch_is_a_layer() -> None:
    model = Weighed(lambda w, _: w)
    inventory = of(model, lambda m, x: m(x) + (m.basis @ m.w)[:8, :16])
    assert {layer.name for layer in inventory.layers} == {"w", "head.weight"}
    assert inventory.layer("w").flops == 2 * (8 + 32) * 32 * 32


# --- kinds of weights ---


class Holds(nn.Module):
    """A weight of another kind, its use, and a layer beside it."""

    def __init__(self, weight: Tensor, use: Callable[[Tensor, Tensor], Tensor], trained: bool = True) -> None:
        super().__init__()
        self.odd, self.head = nn.Parameter(weight, requires_grad=trained), nn.Linear(32, 16)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(x, self.odd))


SQUARE = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))


def _rows(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that this layout is in beta
        return tensor.to_sparse_csr()


KINDS: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor], str]] = {
    "complex": (SQUARE.to(torch.complex64), lambda x, w: (x.to(w.dtype) @ w).real, "its dtype is complex64"),
    "complex, multiplied": (torch.ones(32, dtype=torch.complex64), lambda x, w: (x * w).real, "read by"),
    "float8": (SQUARE.to(torch.float8_e4m3fn), lambda x, w: x @ w.to(x.dtype), "its dtype is float8_e4m3fn"),
    "int8": (SQUARE.to(torch.int8), lambda x, w: x @ (w.to(x.dtype) * 0.1), "computed from it"),
    "int8, cast": (SQUARE.to(torch.int8), lambda x, w: x @ w.to(x.dtype), "its dtype is int8"),
    "sparse": (SQUARE.relu().to_sparse(), lambda x, w: torch.sparse.mm(w, x.t()).t(), "sparse product _sparse_mm"),
    "sparse rows": (_rows(SQUARE.relu()), lambda x, w: (w @ x.t()).t(), "a sparse_csr tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_weight_of_another_kind_is_named_and_the_rest_is_searched(name: str) -> None:
    weight, use, said = KINDS[name]
    inventory = of(Holds(weight, use, trained=weight.is_floating_point() or weight.is_complex()))
    assert [layer.name for layer in inventory.layers] == ["head.weight"]
    (reason,) = [other.reason for other in inventory.others if other.name == "odd"]
    assert said in reason
    assert inventory.covered == 1.0 if "multiplied" in name else inventory.covered < 1.0


def test_a_nested_weight_is_named() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 32), torch.randn(5, 32)], layout=torch.jagged)
    inventory = of(Holds(nested, lambda x, w: x + w.values().mean(0)))
    assert [layer.name for layer in inventory.layers] == ["head.weight"]
    assert "never read" not in next(other.reason for other in inventory.others if other.name == "odd")


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (
        lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16, device="meta")),
        r"1\.weight on the meta device",
    ),
    "meta buffer": (lambda: _with_buffer(torch.zeros(3, device="meta")), r"space on the meta device"),
    "lazy": (lambda: nn.Sequential(nn.Linear(32, 8), nn.LazyLinear(16)), r"1\.weight \(UninitializedParameter\)"),
    "quantised tensor": (
        lambda: _with_parameter(torch.quantize_per_tensor(SQUARE, 0.1, 0, torch.qint8)),
        r"odd in torch\.qint8",
    ),
    "subclass": (lambda: _with_parameter(_Wrapped(SQUARE)), r"odd, a _Wrapped"),
}


class _Wrapped(Tensor):
    """As torchao's tensors: made of another, and computing for itself."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return _Wrapped(args[0].inner)
        raise AssertionError(func)

    def __repr__(self, **_: Any) -> str:
        return "wrapped"


def _with_parameter(tensor: Tensor) -> nn.Module:
    model = nn.Linear(32, 16)
    model.register_parameter("odd", nn.Parameter(tensor, requires_grad=False))
    return model


def _with_buffer(tensor: Tensor) -> nn.Module:
    model = nn.Linear(32, 16)
    model.register_buffer("space", tensor)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_looked_into_is_refused_by_name_with_what_to_do(name: str) -> None:
    build, said = REFUSED[name]
    model = build()
    with pytest.raises(ModelError, match=rf"expected .*got {said}.*(;|\.) ?\w+"):
        of(model)


def test_a_parameter_class_of_the_user_s_own_is_a_weight() -> None:
    class Named(nn.Parameter):
        pass

    model = nn.Linear(32, 16)
    model.weight = Named(model.weight.detach())
    assert [layer.name for layer in of(model).layers] == ["weight"]


@pytest.mark.filterwarnings("ignore")
def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    from torch.distributed.fsdp import fully_shard

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = fully_shard(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16)), mesh=mesh)
        with pytest.raises(ModelError, match=r"0\.weight, a DTensor.*full_tensor"):
            of(model)
    finally:
        distributed.destroy_process_group()


# --- transforms ---


def test_a_model_under_vmap_is_discovered_and_emulated() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    plain, mapped = of(model), of(model, lambda m, b: torch.vmap(m)(b))
    assert {layer.name: (layer.flops, layer.contracted) for layer in mapped.layers} == {
        layer.name: (layer.flops, layer.contracted) for layer in plain.layers
    }
    assert [layer.reads[0].rows for layer in mapped.layers] == [8, 8]
    assert mapped.flops == plain.flops
    assert [layer.dead for layer in mapped.layers] == [None, None]
    # Rounding an input there has no batching rule in torch: such pairs are refused for that layer alone, by the trial.
    low = quantize_layer("0.weight", model[0].weight, (1,), scheme("fp8-weight"), None)
    with torch.no_grad(), quantized(model, {"0.weight": low}):
        torch.testing.assert_close(torch.vmap(model)(X), model(X))


def test_jagged_batches_count_what_they_hold() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()

    def jagged(m: Any, b: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor([b[:3], b[3:]], layout=torch.jagged)
        return torch.stack([user.mean(0) for user in m(nested).unbind()])

    inventory = of(model, jagged)
    assert inventory.flops == inventory.layer_flops == of(model).flops
    assert inventory.layer("0.weight").reads[0].rows == 8


@pytest.mark.parametrize(
    "use",
    [
        lambda m, b: m[2](torch.relu(torch.sparse.mm(b.to_sparse(), m[0].weight.t()))),
        lambda m, b: m[2](torch.relu(torch.mm(b.to_sparse(), m[0].weight.t()))),
        lambda m, b: m[2](torch.relu(torch.sparse.addmm(m[0].bias.expand(8, -1), b.to_sparse(), m[0].weight.t()))),
    ],
)
def test_a_sparse_input_stops_nothing(use: Callable[[Any, Tensor], Tensor]) -> None:
    inventory = of(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)), use)
    assert "2.weight" in {layer.name for layer in inventory.layers}
    assert inventory.flops == 2 * 8 * (32 * 64 + 64 * 16)

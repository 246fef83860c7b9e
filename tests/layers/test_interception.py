"""Every call site of a weight is seen, whatever its spelling; and the model stays as it was."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precimap.errors import MapError, ModelError
from precimap.layers.discover import discover
from precimap.layers.emulation import quantized
from precimap.layers.interception import Interception
from precimap.layers.quantized import quantize_layer
from precimap.layers.views import parameter_names
from precimap.numerics.fast import fake_quantize
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import scheme

W = torch.randn(32, 48, generator=torch.Generator().manual_seed(1))  # [K, N]
X = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))


class Raw(nn.Module):
    """One raw parameter, used by a spelling of `x @ w` given from outside."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weight.clone())


def _into(target: Tensor, call: Callable[[Tensor], object]) -> Tensor:
    """What a call wrote into a tensor; what it returns is not read."""
    call(target)
    return target


# name -> (weight as stored, the call, the weight's contracted dims); each computes X @ W up to a transposition.
SPELLINGS = {
    "F.linear": (W.T.contiguous(), lambda w: F.linear(X, w), (1,)),
    "F.linear keywords": (W.T.contiguous(), lambda w: F.linear(weight=w, input=X), (1,)),
    "torch.matmul": (W, lambda w: torch.matmul(X, w), (0,)),
    "operator @": (W, lambda w: X @ w, (0,)),
    "method": (W, lambda w: X.matmul(w), (0,)),
    "weight on the left": (W.T.contiguous(), lambda w: (w @ X.T).T, (1,)),
    "weight on the left, batched column": (
        W.T.contiguous(),
        lambda w: torch.matmul(w, X.unsqueeze(-1)).squeeze(-1),
        (1,),
    ),
    "mm of t()": (W.T.contiguous(), lambda w: torch.mm(X, w.t()), (1,)),
    "T": (W.T.contiguous(), lambda w: X @ w.T, (1,)),
    "bmm": (W, lambda w: torch.bmm(X.unsqueeze(0), w.unsqueeze(0)).squeeze(0), (0,)),
    "bmm of expand": (W, lambda w: torch.bmm(X.unsqueeze(1), w.expand(6, 32, 48)).squeeze(1), (0,)),
    "addmm": (W, lambda w: torch.addmm(torch.zeros(48), X, w), (0,)),
    "addmm method": (W, lambda w: torch.zeros(6, 48).addmm(X, w), (0,)),
    "baddbmm": (W, lambda w: torch.baddbmm(torch.zeros(1, 6, 48), X[None], w[None])[0], (0,)),
    "einsum": (W, lambda w: torch.einsum("bk,kn->bn", X, w), (0,)),
    "einsum, weight first": (W, lambda w: torch.einsum("kn,bk->bn", w, X), (0,)),
    "einsum, implicit": (W, lambda w: torch.einsum("bk,kn", X, w), (0,)),
    "einsum, ellipsis": (W, lambda w: torch.einsum("...k,kn->...n", X, w), (0,)),
    "inner": (W.T.contiguous(), lambda w: torch.inner(X, w), (1,)),
    "inner method, weight first": (W.T.contiguous(), lambda w: w.inner(X).T, (1,)),
    "tensordot": (W, lambda w: torch.tensordot(X, w, dims=1), (0,)),
    "tensordot lists": (W, lambda w: torch.tensordot(X, w, dims=([1], [0])), (0,)),
    "chunk": (torch.cat([W, W], 1), lambda w: X @ w.chunk(2, dim=1)[1], (0,)),
    "split of t()": (torch.cat([W, W], 1).T.contiguous(), lambda w: X @ w.t().split(48, 1)[0], (1,)),
    "getitem": (torch.stack([W, W]), lambda w: X @ w[1], (1,)),
    "gather of stacked": (torch.stack([W, W]), lambda w: torch.bmm(X[None], w[torch.tensor([1])])[0], (1,)),
    "unbind": (torch.stack([W, W]), lambda w: X @ torch.unbind(w)[0], (1,)),
    "view": (W.reshape(-1), lambda w: X @ w.view(32, 48), None),
    "flattened heads": (W.reshape(32, 6, 8), lambda w: X @ w.flatten(1), (0,)),
    "permuted": (W.T.contiguous(), lambda w: X @ w.permute(1, 0).contiguous(), (1,)),
    "to float32 and back": (W, lambda w: X @ w.to(torch.float64).to(torch.float32), (0,)),
    "detach": (W, lambda w: X @ w.detach(), (0,)),
    "conv1d of width 1": (W.T.contiguous()[..., None], lambda w: F.conv1d(X.T[None], w)[0].T, (1, 2)),
    "mv": (W.T.contiguous(), lambda w: torch.stack([torch.mv(w, x) for x in X]), (1,)),
    "linalg.matmul": (W, lambda w: torch.linalg.matmul(X, w), (0,)),
    "multi_dot of two": (W, lambda w: torch.linalg.multi_dot([X, w]), (0,)),
    "multi_dot of two, weight first": (W.T.contiguous(), lambda w: torch.linalg.multi_dot((w, X.T)).T, (1,)),
    "addmm_": (W, lambda w: torch.zeros(6, 48).addmm_(X, w), (0,)),
    "addmm_, its tensor read": (W, lambda w: _into(torch.zeros(6, 48), lambda to: to.addmm_(X, w)), (0,)),
    "addmm_ keywords": (W, lambda w: torch.ones(6, 48).addmm_(mat1=X, mat2=w, beta=0), (0,)),
    "baddbmm_": (W, lambda w: torch.zeros(1, 6, 48).baddbmm_(X[None], w[None])[0], (0,)),
    "mm with out": (W, lambda w: _into(torch.empty(0), lambda to: torch.mm(X, w, out=to)), (0,)),
    "aten.mm": (W, lambda w: torch.ops.aten.mm(X, w), (0,)),
    "aten.mm.default": (W, lambda w: torch.ops.aten.mm.default(X, w), (0,)),
    "aten.mm.out": (W, lambda w: _into(torch.empty(6, 48), lambda to: torch.ops.aten.mm.out(X, w, out=to)), (0,)),
    "aten.mm of aten.t": (W.T.contiguous(), lambda w: torch.ops.aten.mm(X, torch.ops.aten.t.default(w)), (1,)),
    "aten.bmm": (W, lambda w: torch.ops.aten.bmm(X[None], torch.ops.aten.unsqueeze.default(w, 0))[0], (0,)),
    "aten.addmm": (W, lambda w: torch.ops.aten.addmm.default(torch.zeros(48), X, w), (0,)),
    "aten.addmm_": (W, lambda w: torch.ops.aten.addmm_.default(torch.zeros(6, 48), X, w), (0,)),
    "aten.baddbmm": (W, lambda w: torch.ops.aten.baddbmm(torch.zeros(1, 6, 48), X[None], w[None])[0], (0,)),
    "aten.linear": (W.T.contiguous(), lambda w: torch.ops.aten.linear.default(X, w), (1,)),
    "aten.matmul": (W, lambda w: torch.ops.aten.matmul(X, w), (0,)),
    "aten.einsum": (W, lambda w: torch.ops.aten.einsum("bk,kn->bn", [X, w]), (0,)),
    "aten.inner": (W.T.contiguous(), lambda w: torch.ops.aten.inner(X, w), (1,)),
    "aten.tensordot": (W, lambda w: torch.ops.aten.tensordot(X, w, [1], [-2]), (0,)),
    "aten.convolution of width 1": (
        W.T.contiguous()[..., None],
        lambda w: torch.ops.aten.convolution(X.T[None], w, None, [1], [0], [1], False, [0], 1)[0].T,
        (1, 2),
    ),
    "conv_transpose1d of width 1": (W[..., None], lambda w: F.conv_transpose1d(X.T[None], w)[0].T, (0, 2)),
    "aten.convolution, transposed": (
        W[..., None],
        lambda w: torch.ops.aten.convolution.default(X.T[None], w, None, [1], [0], [1], True, [0], 1)[0].T,
        (0, 2),
    ),
    "aten.mv": (W.T.contiguous(), lambda w: torch.stack([torch.ops.aten.mv(w, x) for x in X]), (1,)),
    "addmv": (W.T.contiguous(), lambda w: torch.stack([torch.zeros(48).addmv(w, x) for x in X]), (1,)),
    "addmv_": (W.T.contiguous(), lambda w: torch.stack([torch.zeros(48).addmv_(w, x) for x in X]), (1,)),
    "_grouped_mm": (
        torch.stack([W, W]).bfloat16(),
        lambda w: torch._grouped_mm(X.bfloat16(), w, offs=torch.tensor([2, 6], dtype=torch.int32)).float(),
        (1,),
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_a_layer(spelling: str) -> None:
    weight, call, contracted = SPELLINGS[spelling]
    inventory = discover(Raw(weight), lambda model, _: call(model.w), None)
    (layer,) = inventory.layers
    assert layer.name == "w"
    assert inventory.covered == 1.0
    assert layer.flops == 2 * 6 * 32 * 48
    if contracted is not None:
        assert layer.contracted == contracted
        assert (layer.inputs, layer.outputs) == (32, 48)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "int8", "fp8-weight"])
def test_every_spelling_computes_the_same_emulation(spelling: str, name: str) -> None:
    weight, call, contracted = SPELLINGS[spelling]
    chosen = scheme(name)
    if contracted is None:
        contracted = (0,)
        if name != "fp8-tensor":
            pytest.skip("a flat parameter has no channels; discovery says so")
    model = Raw(weight)
    layer = quantize_layer("w", model.w, contracted, chosen, None)
    with torch.no_grad(), quantized(model, {"w": layer}):
        found = call(model.w)
    # The oracle: plain matrices, per-channel scales over columns of W, per-token scales over rows of X.
    w = fake_quantize(W, chosen.weight.format, fit(W, chosen.weight, (0,)))
    x = X if chosen.input is None else fake_quantize(X, chosen.input.format, fit(X, chosen.input, (1,)))
    expected = x @ w
    if spelling == "_grouped_mm":
        x16 = X.bfloat16().float()
        w16 = W.bfloat16().float()
        w = fake_quantize(w16, chosen.weight.format, fit(w16, chosen.weight, (0,)))
        x = x16 if chosen.input is None else fake_quantize(x16, chosen.input.format, fit(x16, chosen.input, (1,)))
        expected = (x @ w).bfloat16().float()
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        return
    if ("of width 1" in spelling or "transposed" in spelling) and chosen.input is not None:
        # One example of a convolution shares its scale over positions; here the example is all of X.
        x = fake_quantize(X, chosen.input.format, fit(X, chosen.input, (0, 1)))
        expected = x @ w
    if spelling in ("mv", "aten.mv", "addmv", "addmv_") and name == "fp8-tensor":
        assert chosen.input is not None
        expected = torch.cat(
            [fake_quantize(r, chosen.input.format, fit(r, chosen.input, (0, 1))) @ w for r in X.split(1)]
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, X @ W)


def test_attention_shows_its_packed_projections() -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    torch.backends.mha.set_fastpath_enabled(False)  # the fused path rounds differently
    try:
        with torch.no_grad():
            before = attention(x, x, x)[0]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    inventory = discover(attention, lambda m, b: m(b, b, b)[0], x)
    assert {layer.name for layer in inventory.layers} == {"in_proj_weight", "out_proj.weight"}
    assert not inventory.layer("out_proj.weight").in_linear_module
    with torch.no_grad(), quantized(attention, {}):
        assert torch.equal(attention(x, x, x)[0], before)


def test_a_shared_module_is_quantised_at_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.relu(self.a(x)))

    model, x = Twice().eval(), torch.randn(4, 16)
    inventory = discover(model, lambda m, b: m(b), x)
    assert inventory.layer("a.weight").calls == 2
    layer = quantize_layer("a.weight", model.a.weight, (1,), scheme("int8-weight"), None)
    with torch.no_grad():
        with quantized(model, {"a.weight": layer}):
            found = model(x)
        hidden = torch.relu(F.linear(x, layer.weight(), model.a.bias))
        torch.testing.assert_close(found, F.linear(hidden, layer.weight(), model.a.bias))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile imports its own scripted classes
def test_a_compiled_model_is_seen_under_its_plain_names() -> None:
    inner = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    compiled = torch.compile(inner)
    inventory = discover(compiled, lambda m, b: m(b), torch.randn(3, 16))
    assert [layer.name for layer in inventory.layers] == ["0.weight", "2.weight"]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.jit.trace(nn.Linear(4, 4), torch.randn(1, 4), check_trace=False)

    with pytest.raises(ModelError, match=r"TorchScript in inner"):
        discover(Holder(), lambda m, b: m.inner(b), torch.randn(1, 4))


def test_an_exception_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    x, before = torch.randn(4, 16), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = model(x)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    layer = quantize_layer("0.weight", model[0].weight, (1,), scheme("fp8"), None)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), quantized(model, {"0.weight": layer}):
        model(torch.randn(4, 15))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    with torch.no_grad():
        assert torch.equal(model(x), plain)


def test_a_bf16_model_is_emulated_in_float32_and_answers_in_bf16() -> None:
    model = nn.Linear(64, 32).bfloat16().eval()
    x = torch.randn(8, 64).bfloat16()
    layer = quantize_layer("weight", model.weight, (1,), scheme("fp8"), None)
    with torch.no_grad(), quantized(model, {"weight": layer}):
        found = model(x)
    rounding = scheme("fp8").input
    assert rounding is not None
    rounded = fake_quantize(x, rounding.format, fit(x.float(), rounding, (1,)))
    expected = F.linear(rounded, layer.weight(), model.bias.detach().float())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


def test_autocast_is_respected() -> None:
    model = nn.Linear(64, 32).eval()
    layer = quantize_layer("weight", model.weight, (1,), scheme("fp8"), None)
    with torch.no_grad(), quantized(model, {"weight": layer}), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 64)).dtype == torch.bfloat16


def test_a_tied_table_is_looked_up_in_base_precision() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(32, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) @ self.table.weight.t()

    model, ids = Tied().eval(), torch.arange(8)
    layer = quantize_layer("table.weight", model.table.weight, (1,), scheme("fp8"), None)
    rounding = layer.scheme.input
    assert rounding is not None
    with torch.no_grad(), quantized(model, {"table.weight": layer}):
        found = model(ids)
    rows = model.table.weight.detach()[ids]
    expected = fake_quantize(rows, rounding.format, fit(rows, rounding, (1,))) @ layer.weight().t()
    torch.testing.assert_close(found, expected)


def test_an_unknown_layer_is_named() -> None:
    model = nn.Linear(4, 4)
    layer = quantize_layer("weight", model.weight, (1,), scheme("fp8"), None)
    with pytest.raises(MapError, match="nowhere"), quantized(model, {"nowhere": layer}):
        pass


def test_names_are_those_of_the_first_registration() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert list(parameter_names(model)) == ["a.weight", "a.bias"]


def _stance() -> str:
    import torch._dynamo.eval_frame as frames

    return str(frames._stance.stance)


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("stance", ["default", "eager_on_recompile"])
def test_threads_that_overlap_leave_the_user_s_settings(fast_path: bool, stance: str) -> None:
    """The first to come is the first to leave: restoring what each found would leave both settings off for good."""
    import torch._dynamo  # so that there is a stance to keep

    before = torch.backends.mha.get_fastpath_enabled()
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def watch() -> None:
        with Interception({}):
            inside.set()
            leave.wait(30)
            seen.append((torch.backends.mha.get_fastpath_enabled(), _stance()))

    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        with torch.compiler.set_stance(stance):
            other = threading.Thread(target=watch)
            with Interception({}):
                other.start()
                assert inside.wait(30)
            seen.append((torch.backends.mha.get_fastpath_enabled(), _stance()))  # the other still watches
            leave.set()
            other.join(30)
            assert seen == [(False, "force_eager")] * 2
            assert (torch.backends.mha.get_fastpath_enabled(), _stance()) == (fast_path, stance)
            with Interception({}), Interception({}):
                assert not torch.backends.mha.get_fastpath_enabled()
            assert (torch.backends.mha.get_fastpath_enabled(), _stance()) == (fast_path, stance)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

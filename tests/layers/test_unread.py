"""A parameter that nobody is seen to read is changed once: only of what changes nothing it is said that it is never read."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precimap.layers.discover import discover
from precimap.layers.inventory import Inventory
from precimap.layers.unread import MOST_PASSES, told_apart

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two hidden weights, a spare one that nobody reads, and a head; `call` says how the hidden ones are read."""

    def __init__(self, call: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 16)
        self.call = call
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.head(self.call(self, x))


def in_a_thread(run: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor] = []

    def inside() -> None:
        with torch.no_grad():
            found.append(run())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    return found[0]


def in_a_pool(run: Callable[[], Tensor]) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: run().detach()).result()


def by_numpy(model: Net, x: Tensor) -> Tensor:
    """Memory that was taken out of torch before anybody watched."""
    a, b = model.arrays  # type: ignore[misc]
    return torch.from_numpy(np.maximum(x.numpy() @ a.T, 0) @ b.T)


def with_arrays(model: Net) -> Net:
    model.arrays = [m.weight.detach().numpy() for m in (model.a, model.b)]  # type: ignore[assignment]
    return model


UNSEEN: dict[str, Callable[[], Net]] = {
    "thread": lambda: Net(lambda m, x: in_a_thread(lambda: m.b(torch.relu(m.a(x))))),
    "pool": lambda: Net(lambda m, x: in_a_pool(lambda: m.b(torch.relu(m.a(x))))),
    "numpy": lambda: with_arrays(Net(by_numpy)),
}


def of(model: Net) -> Inventory:
    return discover(model.eval(), lambda m, b: m(b), X)


@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_read_unseen_is_not_said_to_be_never_read(name: str) -> None:
    model = UNSEEN[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    versions = {key: value._version for key, value in model.named_parameters()}
    reasons = {other.name: other.reason for other in of(model).others}
    for weight in ("a.weight", "b.weight"):
        assert reasons[weight].startswith("read where it cannot be seen"), reasons
    assert reasons["spare.weight"].startswith("never read")
    assert reasons["spare.bias"].startswith("never read")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert versions == {key: value._version for key, value in model.named_parameters()}


def test_scripted_code_is_seen_below_python_and_costs_no_pass() -> None:
    import warnings

    def product(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.relu(x @ w.t()) @ v.t()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(product)
    model = Net(lambda m, x: scripted(x, m.a.weight, m.b.weight) + m.a.bias + m.b.bias + m.spare(torch.zeros(1, 64)))
    reasons = {other.name: other.reason for other in of(model).others}
    assert reasons["a.weight"] == reasons["b.weight"] == "read by aten.mm, in a call that does not show the parameter"
    assert model.passes == 1


def test_a_model_without_a_secret_costs_one_more_forward() -> None:
    model = Net(lambda m, x: m.b(torch.relu(m.a(x))))
    reasons = {other.name: other.reason for other in of(model).others}
    assert reasons["spare.weight"] == reasons["spare.bias"] == "never read: no call of this batch used it"
    assert model.passes == 2
    model = Net(lambda m, x: m.spare(m.b(torch.relu(m.a(x)))))
    of(model)
    assert model.passes == 1


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    """And a failure with other values says that they matter."""

    def picky(m: Net, x: Tensor) -> Tensor:
        total = in_a_thread(lambda: m.a.weight.detach().sum())
        if float(total) != m.total:  # type: ignore[arg-type]
            raise RuntimeError("these are not my weights")
        return m.b(torch.relu(F.linear(x, torch.ones(64, 32))))

    model = Net(picky)
    model.total = float(model.a.weight.detach().sum())  # type: ignore[assignment]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reasons = {other.name: other.reason for other in of(model).others}
    assert reasons["a.weight"].startswith("read where it cannot be seen")
    assert reasons["a.bias"].startswith("never read")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    model = nn.Linear(32, 16)
    before = model.weight.detach().clone()

    def interrupted(m: Any, b: Tensor) -> Tensor:
        assert not torch.equal(m.weight, before)
        raise error

    with pytest.raises(error):
        told_apart(model, interrupted, X, torch.zeros(1), dict(model.named_parameters()))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([0.0, -0.0, float("nan"), float("inf")]),
        torch.tensor([1, 2, 3]),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.randn(4).to(torch.float8_e4m3fn),
        torch.zeros(3, 2).t(),
    ],
)
def test_any_kind_of_value_is_changed_and_put_back_to_the_bit(values: Tensor) -> None:
    parameter = nn.Parameter(values.clone(), requires_grad=False)
    bits = parameter.detach().contiguous().view(torch.uint8).clone()
    seen: list[Tensor] = []

    def read(_: Any, __: Any) -> Tensor:
        with torch.no_grad():
            seen.append(parameter.detach().contiguous().view(torch.uint8).clone())
        return seen[-1]

    told = told_apart(nn.Linear(1, 1), read, None, bits, {"p": parameter})
    assert not torch.equal(seen[0], bits)
    assert told["p"].startswith("read where it cannot be seen")
    assert torch.equal(parameter.detach().contiguous().view(torch.uint8), bits)


def test_inference_tensors_are_put_back() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16))
    before = model[1].weight.clone()
    inventory = discover(model, lambda m, b: m[0](b), X)
    assert {other.reason for other in inventory.others if other.name.startswith("1.")} == {
        "never read: no call of this batch used it"
    }
    assert torch.equal(model[1].weight, before)


def test_an_output_that_differs_by_itself_tells_nothing() -> None:
    model = Net(lambda m, x: m.b(torch.relu(m.a(x))) + torch.rand(()))
    reasons = {other.name: other.reason for other in of(model).others}
    assert "differs from call to call" in reasons["spare.weight"]


def test_many_secrets_are_parted_in_so_many_passes_and_no_more() -> None:
    model = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(100)])
    passes = 0

    def forward(m: Any, x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1

        def all_of_them() -> Tensor:
            h = x
            for layer in list(m)[:90]:
                h = torch.tanh(layer(h)) + x
            return h

        return in_a_thread(all_of_them)

    inventory = discover(model, forward, X)
    assert passes <= MOST_PASSES + 3
    read = [other for other in inventory.others if other.reason.startswith("read where it cannot be seen")]
    assert len(read) >= 90


def test_memory_that_another_parameter_has_is_no_secret() -> None:
    model = Net(lambda m, x: m.b(torch.relu(m.a(x))))
    model.spare.weight = nn.Parameter(model.b.weight.data)
    model.spare.bias = nn.Parameter(model.b.bias.data)
    reasons = {other.name: other.reason for other in of(model).others}
    assert "its memory is that of another parameter" in reasons["spare.weight"]
    assert model.passes == 1


def test_memory_that_other_processes_see_is_not_touched() -> None:
    model = Net(lambda m, x: m.b(torch.relu(m.a(x))))
    model.spare.share_memory()
    reasons = {other.name: other.reason for other in of(model).others}
    assert "shared with other processes" in reasons["spare.weight"]
    assert model.passes == 1


def test_a_copy_is_no_read() -> None:
    """Weights that are cast together, whatever the batch needs of them."""

    def cast(m: Net, x: Tensor) -> Tensor:
        weights = {name: parameter.double() for name, parameter in m.named_parameters()}
        return F.linear(torch.relu(F.linear(x.double(), weights["a.weight"])), weights["b.weight"]).float()

    inventory = of(Net(cast))
    assert {layer.name for layer in inventory.layers} == {"a.weight", "b.weight", "head.weight"}
    reasons = {other.name: other.reason for other in inventory.others}
    assert reasons["spare.weight"].startswith("never read")


def test_a_model_that_returns_memory_of_its_own_is_not_compared_with_itself() -> None:
    class Static(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(32, 64), nn.Linear(64, 16)
            self.register_buffer("scores", torch.zeros(8, 16), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.scores.copy_(self.head(in_a_thread(lambda: torch.relu(self.a(x)))))
            return self.scores

    inventory = discover(Static().eval(), lambda m, b: m(b), X)
    assert {o.name for o in inventory.others if o.reason.startswith("read where")} == {"a.weight", "a.bias"}

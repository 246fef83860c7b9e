"""Random programs: a probe by replay has the bits of the plain probe, whatever the program does to its tensors.

A program is a list of instructions on a few registers [4, 16]; most of them write in place, through views or behind
torch's back. Two copies of one model run the same passes, one plainly and one by replay; outputs, batch and buffers
must agree after every pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from precimap.layers.emulation import Emulation, operands
from precimap.layers.quantized import QuantizedLayer, quantize_layer
from precimap.layers.replay import Recording, Replay
from precimap.layers.views import parameter_names
from precimap.numerics.schemes import scheme

ROWS, WIDTH, REGISTERS = 4, 16, 4
LAYERS = ("first", "second", "packed")


class Machine(nn.Module):
    """Registers and what the instructions work on: three weights, a buffer, and a tensor kept from pass to pass."""

    buffer: Tensor

    def __init__(self, program: list[tuple[str, int, int, int]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 4)
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 4)
        self.packed = nn.Parameter(torch.randn(2 * WIDTH, WIDTH, generator=generator) / 4)
        self.register_buffer("buffer", torch.zeros(ROWS, WIDTH))
        self.kept: Tensor = torch.zeros(ROWS, WIDTH)
        self.program = program

    def forward(self, batch: Tensor) -> Tensor:
        registers = [batch, torch.tanh(batch), batch.flip(0), F.linear(batch, self.first)]
        for name, a, b, to in self.program:
            try:
                result = INSTRUCTIONS[name](self, registers[a], registers[b])
            except RuntimeError:  # what torch refuses (overlapping memory) it refuses in both runs
                continue
            registers[to] = result
        return torch.stack(registers)


def _numpy(_: Machine, a: Tensor, b: Tensor) -> Tensor:
    a.numpy()[0, :3] += 1.0
    return a


def _numpy_later(machine: Machine, a: Tensor, b: Tensor) -> Tensor:
    memory = a.numpy()
    before = torch.tanh(a)
    memory[1] = 0.5
    return before + torch.tanh(a) + b


def _unseen(_: Machine, a: Tensor, b: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        a.add_(1.0)
    return a


def _unannounced(_: Machine, a: Tensor, b: Tensor) -> Tensor:
    mean, variance = a.mean(0), b.var(0)
    normal = F.batch_norm(a, mean, variance, training=True)
    return normal + mean + variance


def _unannounced_alias(machine: Machine, a: Tensor, b: Tensor) -> Tensor:
    rows = a * 3.0
    before = rows * F.linear(b, machine.second)
    return F.embedding(torch.tensor([0, 3, 1, 1]), rows.data, max_norm=0.5) + before


def _branch(machine: Machine, a: Tensor, b: Tensor) -> Tensor:
    if float(a.sum()) > float(b.sum()):
        return F.linear(a, machine.second)
    return F.gelu(b).mul_(2.0)


def _route(machine: Machine, a: Tensor, b: Tensor) -> Tensor:
    result = torch.zeros_like(a)
    rows = torch.nonzero(a[:, 0] > b[:, 0]).squeeze(1)
    result[rows] = F.linear(a[rows], machine.first)
    return result.index_add_(0, rows, b[rows])


def _twice(machine: Machine, a: Tensor, b: Tensor) -> Tensor:
    one, other = F.linear(a, machine.first), F.linear(a, machine.first)
    one.add_(1.0)
    return one * other


def _out(machine: Machine, a: Tensor, b: Tensor) -> Tensor:
    room = torch.empty(ROWS, WIDTH)
    torch.matmul(a, machine.second.t(), out=room)
    return torch.add(room, b, out=b)


def _into(_: Machine, a: Tensor, b: Tensor) -> Tensor:
    a[1:3, ::2] = b[:2, 1::2]
    return a


def _masked(_: Machine, a: Tensor, b: Tensor) -> Tensor:
    a[b > 0.5] = 0.25
    return a


def _count(machine: Machine, a: Tensor, b: Tensor) -> Tensor:
    machine.buffer.add_(a.mean())
    return b + machine.buffer


def _keep(machine: Machine, a: Tensor, b: Tensor) -> Tensor:
    before, machine.kept = machine.kept, F.linear(a, machine.second)
    return before + b


def _gradient(machine: Machine, a: Tensor, b: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = a.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.tanh(leaf).sum(), leaf)
    return gradient + b


def _swap_data(machine: Machine, a: Tensor, b: Tensor) -> Tensor:
    copy = a.clone()
    copy.data = torch.sigmoid(b)
    copy.data.add_(1.0)
    return copy


INSTRUCTIONS: dict[str, Callable[[Machine, Tensor, Tensor], Tensor]] = {
    "linear": lambda m, a, b: F.linear(a, m.first),
    "linear by keywords": lambda m, a, b: F.linear(weight=m.second, input=a),
    "packed": lambda m, a, b: a @ m.packed.chunk(2)[1].t(),
    "matmul": lambda m, a, b: torch.matmul(a, m.second.t()),
    "relu": lambda m, a, b: torch.relu(a),
    "relu_": lambda m, a, b: a.relu_(),
    "relu in place": lambda m, a, b: F.relu(a, inplace=True),
    "positional in place": lambda m, a, b: F.leaky_relu(a, 0.1, True),
    "add_": lambda m, a, b: a.add_(b),
    "operator": lambda m, a, b: a.__iadd__(b.sigmoid()),
    "through a view": lambda m, a, b: (a[:, 2:5].mul_(0.5), a)[1],
    "through t": lambda m, a, b: (a.t()[1].add_(b[0, 0]), a)[1],
    "through data": lambda m, a, b: (a.data.add_(1.0), a)[1],
    "through detach": lambda m, a, b: (a.detach().mul_(0.75), a)[1],
    "into": _into,
    "masked": _masked,
    "out": _out,
    "gather": lambda m, a, b: a[torch.tensor([3, 2, 1, 0])],
    "cat and chunk": lambda m, a, b: torch.cat([a, b], 1).chunk(2, 1)[1],
    "max and indices": lambda m, a, b: a.max(0, keepdim=True).values + a.gather(0, b.max(0, keepdim=True)[1]) + b,
    "sort": lambda m, a, b: torch.sort(a, dim=1, descending=True)[0],
    "expand": lambda m, a, b: a[:1].expand(ROWS, WIDTH) * b,
    "lookalike": lambda m, a, b: a.unsqueeze_(0).squeeze_(0),
    "scalars": lambda m, a, b: torch.full((ROWS, WIDTH), 1.0) * a + torch.full((ROWS, WIDTH), 1) - (a * -0.0),
    "normalised": lambda m, a, b: F.layer_norm(a, (WIDTH,)),
    "empty": lambda m, a, b: a[:0].sum(0) + b,
    "filled later": lambda m, a, b: torch.empty_like(a).copy_(b),
    "noise": lambda m, a, b: a + torch.rand_like(a),
    "dropout": lambda m, a, b: F.dropout(a, 0.5, training=True),
    "no dropout": lambda m, a, b: F.dropout(a, 0.5, training=False),
    "autocast": lambda m, a, b: _autocast(m, a),
    "aten": lambda m, a, b: torch.ops.aten.mul_(a, 0.5) + torch.ops.aten.tanh.default(b),
    "branch": _branch,
    "route": _route,
    "twice": _twice,
    "count": _count,
    "keep": _keep,
    "read kept": lambda m, a, b: F.linear(m.kept, m.first) + a,
    "write kept": lambda m, a, b: m.kept.mul_(0.5) + a,
    "gradient": _gradient,
    "swap data": _swap_data,
    "numpy": _numpy,
    "numpy later": _numpy_later,
    "unseen": _unseen,
    "unannounced": _unannounced,
    "unannounced alias": _unannounced_alias,
    "renormed rows": lambda m, a, b: F.embedding(torch.tensor([0, 3, 1, 1]), m.second, max_norm=0.9) + a,
    "shrink weight": lambda m, a, b: (m.packed.mul_(0.875), a)[1],
}


def _autocast(machine: Machine, a: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        low = F.linear(a, machine.second)
    return low.float() + F.linear(a, machine.second)


INSTRUCTION = st.tuples(
    st.sampled_from(sorted(INSTRUCTIONS)),
    st.integers(0, REGISTERS - 1),
    st.integers(0, REGISTERS - 1),
    st.integers(0, REGISTERS - 1),
)


def run(program: list[tuple[str, int, int, int]], limit: float | None) -> tuple[list[bytes], Recording]:
    """The bits of everything that can be seen after each pass; limit None runs the plain passes."""
    model, batch = Machine(program), torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5))
    weights, recording = parameter_names(model), Recording(0.0 if limit is None else limit)
    passes: list[dict[str, QuantizedLayer]] = [{}]
    passes += [{name: quantize_layer(name, weights[name], (1,), scheme("fp8"), None)} for name in LAYERS]
    seen, kept = [], []
    for number, layers in enumerate([*passes, passes[1]]):
        mode: AbstractContextManager[object]
        if limit is None:
            mode = Emulation(weights, layers, operands(layers))
        else:
            mode = Replay(weights, layers, operands(layers), recording)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(number)
            with mode:
                output = model(batch)
            kept.append(output)
            visible = [*kept, batch, model.buffer, model.kept, model.packed.detach(), torch.rand(2)]
        seen += [value.contiguous().numpy().tobytes() for value in visible]
    return seen, recording


@settings(max_examples=60, deadline=None)
@given(st.lists(INSTRUCTION, min_size=1, max_size=14), st.sampled_from([float("inf"), 1500.0, 0.0]))
def test_replay_has_the_bits_of_the_plain_probes(program: list[tuple[str, int, int, int]], limit: float) -> None:
    plain, _ = run(program, None)
    replayed, _ = run(program, limit)
    assert replayed == plain


def test_each_instruction_alone_and_after_another_linear() -> None:
    for name in INSTRUCTIONS:
        for program in (
            [(name, 3, 1, 2), ("linear", 3, 0, 0)],
            [("matmul", 1, 1, 1), (name, 1, 3, 1), (name, 1, 2, 3)],
        ):
            plain, _ = run(program, None)
            replayed, recording = run(program, float("inf"))
            assert replayed == plain, (name, program)
            assert recording.replayed > 0, (name, program)

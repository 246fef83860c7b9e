"""Products of codes: what a matrix unit multiplies, and where this machine has one, in it.

x ~ q_x * s_x and w ~ q_w * s_w, with scales that are constant along the contracted dims, give

    y = (sum of q_x * q_w) * s_x * s_w + bias        from left to right, each step rounded to float32

Codes of at most 8 bits less their zero are exact in BF16 and in TF32, and their products in float32; so are BF16 values,
whose scale is 1 (tiles take those below 2**-126 for zeros). What is rounded is each
addition of the sum, in an order that is the machine's own, both scalings and the bias. Invariant, for K contracted values:
|y - exact| <= (K + 3) * 2**-24 * (sum of |x * w| + |bias|), as of a float32 product of the dequantised values, and of
the same size in practice. Sums of whole-number codes below 2**24 (K <= 518 for 8 unsigned bits) have no error:
there y has the same bits on every machine. Other sums differ in their last bits between machines, as float32 products do.

On CPUs with BF16 tiles (AMX) the product takes a third to a half of the time of one in float32. torch offers it for
float32 tensors only, by a setting of the whole process (`torch.backends.mkldnn.matmul.fp32_precision`), under which any
other product of float32 tensors would lose 16 bits: so it is on for the product of codes alone, and only while no
other thread could multiply (`_alone`); else, and on other machines, the same codes are multiplied in plain float32. Not
taken: BF16 tensors, whose product torch rounds to BF16 on CPUs; `torch._scaled_mm` and oneDNN's FP8 product, which are
slower than float32 there; oneDNN's INT8 product, a kernel that this is to be the oracle of; BF16 on CPUs that have it
without tiles and on GPUs, where nothing was measured.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from precimap.errors import FAILURES
from precimap.layers.interception import WeightCall
from precimap.numerics.fast import parts
from precimap.numerics.formats import BF16, Format, IntegerFormat
from precimap.numerics.schemes import FusedRows, Scheme

# With scales within these no step of y = sum * s_x * s_w leaves the normal float32 numbers where values would not.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-60, 2.0**60

_PART = 1 << 16  # results that each thread scales at a time: they stay in the cache

_MATMULS = (
    "matmul",
    "mm",
    "bmm",
    "addmm",
)  # their result has the free dims of both operands where the operands have them
_NEVER_MULTIPLY = (  # modules whose threads draw bars, pass messages or wait, and run nobody's code
    "rich",
    "tqdm",
    "multiprocessing.queues",  # the feeder of a queue
    "multiprocessing.resource_sharer",  # hands tensors' files to other processes
    "torch.utils.data._utils.pin_memory",
    "ipykernel.iostream",  # these live in every notebook
    "ipykernel.heartbeat",
    "ipykernel.control",
    "ipykernel.shellchannel",
    "ipykernel.parentpoller",
    "IPython.core.history",
)


@dataclass(frozen=True, slots=True, eq=False)
class CodedWeight:
    """A weight to be multiplied as codes. values: codes less their zero, float32, in the parameter's shape; scale: float32,
    which broadcasts against them."""

    values: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        """The float32 weight, with the bits of `numerics.dequantize`."""
        return self.values * self.scale


Operand = Tensor | CodedWeight  # a layer's weight as the emulation takes it: its float32 values, or its codes


@dataclass(frozen=True, slots=True, eq=False)
class CodedInput:
    """An input as codes less their zero, float32, and the scale that goes on the result."""

    values: Tensor
    scale: Tensor


def multiplies_codes(scheme: Scheme, weight_scale: Tensor) -> bool:
    """Whether products of a layer are products of codes, where their ops allow it."""
    if scheme.input is None or isinstance(scheme.weight.range, FusedRows):
        return False
    return _exact_in_bf16(scheme.weight.format) and _exact_in_bf16(scheme.input.format) and in_range(weight_scale)


def _exact_in_bf16(format: Format) -> bool:
    """Whether every code less every zero is a BF16 number: 8 bits of significance within its exponents."""
    if isinstance(format, IntegerFormat):
        return format.maximum - format.minimum <= 256
    return format.bits <= 8 or format == BF16


def in_range(scale: Tensor) -> bool:
    """Whether results can be scaled with it step by step; not so where there is none, or NaN."""
    if not scale.numel():
        return False
    low, high = torch.aminmax(scale)
    return bool(low >= _SMALLEST_SCALE) and bool(high <= _LARGEST_SCALE)


def result_scale(call: WeightCall, weight: CodedWeight) -> Tensor | None:
    """The weight's scale in the place where it goes on the call's result; None for another op, and where it cannot.

    It cannot where the call reads a view of the weight that has several scales along the contracted dims: there it is no
    product of the layer's codes.
    """
    if not _is_plain(call):
        return None
    spread = weight.scale.expand(weight.values.shape)
    try:
        spread = call.view.rebuild(spread)
    except FAILURES:  # `view` takes no dims of stride 0
        spread = call.view.rebuild(spread.contiguous())
    kept = spread
    for dim in call.weight_contracted:
        kept = kept.narrow(dim, 0, 1)
    copied = spread.untyped_storage().data_ptr() != weight.scale.untyped_storage().data_ptr()
    if copied and (spread.dtype != torch.float32 or not torch.isin(kept, weight.scale).all()):
        return None
    if any(spread.stride(dim) for dim in call.weight_contracted) and not torch.equal(kept.expand_as(spread), spread):
        return None
    return kept.t() if call.op.name == "linear" else kept


def _is_plain(call: WeightCall) -> bool:
    """Whether the call multiplies two operands with rows and columns, adds a bias once at most, and writes to nothing."""
    x, arguments = call.input, call.arguments
    if (
        call.op.in_place
        or arguments.kwargs.get("out") is not None
        or min(x.dim(), call.weight.dim()) < 2
        or not call.weight.numel()
    ):
        return False
    if type(x) not in (Tensor, torch.nn.Parameter) or x.layout is not torch.strided or not x.is_floating_point():
        return False
    if call.op.name == "linear":
        return call.weight.dim() == 2 and not call.weight_on_left
    if call.op.name == "addmm" and (arguments.get((3, "beta"), 1), arguments.get((4, "alpha"), 1)) != (1, 1):
        return False
    return call.op.name in _MATMULS


def multiply(call: WeightCall, input: CodedInput, weight: CodedWeight, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What the call returns, in `dtype`; `scale` is what `result_scale` gave. No gradient flows through."""
    values = call.view.rebuild(weight.values)
    left, right = (values, input.values) if call.weight_on_left else (input.values, values)
    linear = call.op.name == "linear"
    tiles = left.device.type == "cpu" and has_tiles() and _alone()
    with _in_tiles() if tiles else nullcontext():
        sums = F.linear(left, right) if linear else torch.matmul(left, right)
    bias = call.arguments.get((2, "bias")) if linear else None
    if call.op.name == "addmm":
        bias = call.arguments.get((0, "input"))
    output = sums if dtype == torch.float32 else torch.empty_like(sums, dtype=dtype)
    added = [] if bias is None else [bias.detach().float()]
    limit = _PART * torch.get_num_threads() if sums.device.type == "cpu" else sums.numel()
    for part, scaled, of_input, of_weight, *biases in parts([sums, output, input.scale, scale, *added], limit):
        part.mul_(of_input).mul_(of_weight)
        for each in biases:
            part.add_(each)
        if output is not sums:
            scaled.copy_(part)
    return output


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU has BF16 tiles, and torch multiplies codes in them exactly: looked at once, with sums of whole
    numbers, which have no error."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()):  # type: ignore[no-untyped-call]
        return False
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-255, 256, (256, 256), generator=generator).float() for _ in range(2))
    with _in_tiles():
        found = left @ right
    return torch.equal(found.double(), left.double() @ right.double())


@contextmanager
def _in_tiles() -> Iterator[None]:
    """Inside the block the process multiplies float32 tensors in BF16: only for values that are exact there."""
    settings: Any = torch.backends.mkldnn
    before = settings.matmul.fp32_precision
    settings.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        # What was inherited is inherited again.
        settings.matmul.fp32_precision = "none" if before == settings.fp32_precision else before


def _alone() -> bool:
    """Whether no other Python thread could multiply meanwhile. torch's own threads work for their caller."""
    return threading.active_count() == 1 or all(
        thread is threading.current_thread() or _never_multiplies(thread) for thread in threading.enumerate()
    )


def _never_multiplies(thread: threading.Thread) -> bool:
    """By the module of what it runs; a thread of a class that has a `run` of its own has no target."""
    target = getattr(thread, "_target", None)
    module = getattr(target, "__module__", None) or type(thread).__module__
    return any(module == known or module.startswith(f"{known}.") for known in _NEVER_MULTIPLY)

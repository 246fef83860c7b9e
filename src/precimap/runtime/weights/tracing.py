"""Whether a compiler reads a call instead of running it, and what it may take for constants."""

import torch
from torch._guards import TracingContext


def compiling() -> bool:
    """torch 2.11 says so only of the Python that Dynamo reads, and no more while the operators found there are traced."""
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def freezing() -> bool:
    """Whether Inductor makes constants of weights; a constant to who traces this."""
    return bool(torch._inductor.config.freezing)

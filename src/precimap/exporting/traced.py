"""A model as torch.export traces it: what the writers of packages and of ONNX files begin with.

Invariant: the program holds plain tensors alone. `torch.export` knows the parts of a low weight, but not those of a view
of one, so calls on views are left to its program, which is taken apart once, here. Tracing by reading code (`strict`) is
the second try, for it takes longer and refuses more Python.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from precimap.errors import DeployError, first_line
from precimap.exporting.calls import Calls


def exported_program(model: nn.Module, calls: Calls) -> ExportedProgram:
    """The model in plain tensors: codes and scales, and what is done with them. Sizes that vary are variable.

    Raises DeployError where it cannot be traced, with the reason of a weight that refuses it.
    """
    sizes: Any = torch.export.AdditionalInputs  # has no types
    example, varying = calls.example, sizes()
    for call in calls.each[1:]:
        varying.add(call.args, call.kwargs)
    shapes = varying if len(calls.each) > 1 else None
    failed = []
    for strict in (False, True):
        try:
            with torch.no_grad(), quiet():
                program = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes, strict=strict)
                plain: ExportedProgram = program.run_decompositions({})  # takes low weights apart, and nothing else
                return plain
        except Exception as error:
            if isinstance(root_of(error), DeployError):
                raise root_of(error) from error
            failed.append(error)
    raise DeployError(
        f"torch.export cannot trace {type(model).__name__} ({' and '.join(said(error) for error in failed)}); "
        "`precimap.compile` serves it in a process with Python"
    ) from failed[0]


def root_of(error: BaseException) -> BaseException:
    """What was raised first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and its translators say, and print, about parts of their own."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

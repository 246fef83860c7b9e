"""`import precimap as pm`: every name is there when it is asked for, and not before."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import precimap


def in_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_name_resolves_and_is_listed() -> None:
    listed = dir(precimap)
    for name in precimap.__all__:
        assert getattr(precimap, name) is not None
        assert name in listed
    assert {"__version__", "__all__", "search"} <= set(listed)
    assert precimap.__version__ == version("precimap")


def test_the_oldest_torch_is_the_one_that_is_tested() -> None:
    """`make test-oldest` installs what the package asks for at least."""
    root = Path(__file__).parent.parent
    (asked,) = [
        need
        for need in tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
        if "torch" in need
    ]
    assert f"\n{asked.replace('>=', '==')}.0\n" in (root / "requirements-oldest.txt").read_text()


def test_no_name_is_shadowed_by_a_module() -> None:
    modules = [name for name in precimap.__all__ if isinstance(getattr(precimap, name), ModuleType)]
    assert modules == ["metrics"]


def test_a_star_import_brings_them_all() -> None:
    names: dict[str, object] = {}
    exec("from precimap import *", names)
    assert {name for name in names if name != "__builtins__"} == set(precimap.__all__)
    assert names["search"] is precimap.search


def test_a_name_that_is_none_is_told() -> None:
    with pytest.raises(AttributeError, match=r"^module 'precimap' has no attribute 'nothing'$"):
        precimap.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from precimap import nothing  # noqa: F401
    with pytest.raises(AttributeError, match="'__wrapped__'"):
        precimap.__wrapped__  # noqa: B018


def test_torch_is_imported_when_a_name_is_asked_for() -> None:
    code = """
import sys
import precimap as pm
pm.__version__, hasattr(pm, "__wrapped__")
print("torch" in sys.modules)
found = pm.{name}
print("torch" in sys.modules, type(found).__name__, type(pm.search).__name__, pm.searching.__name__)
"""
    for name, kind in (("search", "function"), ("metrics", "module"), ("errors.MapError", "type")):
        assert in_python(code.format(name=name)).split() == ["False", "True", kind, "function", "precimap.searching"]


def test_the_compiler_is_not_imported_to_find_layers_and_one_that_comes_late_does_not_watch() -> None:
    """What a forward imports may trace what watches it; it is then watched again, with the compiler off."""
    code = """
import sys
import torch
from torch import nn
import precimap as pm
class Late(nn.Linear):
    def forward(self, x):
        import torch._dynamo
        return super().forward(x)
for model in (nn.Linear(16, 32), Late(16, 32)):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = pm.discover(model.eval(), lambda model, x: model(x), torch.randn(4, 16))
    print(found.flops, len(calls), "torch._dynamo" in sys.modules)
"""
    assert in_python(code).splitlines() == ["4096 1 False", "4096 2 True"]

"""Read a Task from the user's own Python: `file.py`, `file.py:function` or `package.module:function`.

The function takes no argument and returns a Task; its default name is `task`. A configuration language was not taken:
models, data and metrics are Python already.
"""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from precimap.errors import PrecimapError, TaskError
from precimap.task import Task

DEFAULT_FUNCTION = "task"


def load_task(reference: str) -> Task:
    """The Task that `reference` names. Raises TaskError that says which line of the user's file failed."""
    location, _, function_name = reference.rpartition(":") if ":" in reference else (reference, "", "")
    function_name = function_name or DEFAULT_FUNCTION
    module = _module(location)
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and callable(v)]
        found = ", ".join(n for n in own if not n.startswith("_")) or "none"
        raise TaskError(
            f"{location}: expected a function {function_name}() that returns a Task; functions there: {found}"
        )
    try:
        made = function()
    except PrecimapError:
        raise
    except Exception as error:
        raise TaskError(f"{location}: {function_name}() failed{_where(error, location)}: {_said(error)}") from error
    if not isinstance(made, Task):
        raise TaskError(f"{location}: expected {function_name}() to return a precimap.Task, got {type(made).__name__}")
    return made


def _module(location: str) -> ModuleType:
    try:
        if not location.endswith(".py"):
            return importlib.import_module(location)
        path = Path(location)
        if not path.is_file():
            raise TaskError(f"expected a task file, got {location}, which does not exist")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # As when Python runs a script: the file may import its neighbours, and pickle finds its classes.
        sys.path.insert(0, str(path.parent.resolve()))
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"{location} does not import{_where(error, location)}: {_said(error)}") from error


def _where(error: Exception, location: str) -> str:
    """The last line of the user's own file in the traceback."""
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(Path(location).name)]
    return f" (line {lines[-1]})" if lines else ""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

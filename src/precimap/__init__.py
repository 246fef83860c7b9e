"""precimap: the fastest per-layer precision map that your own task metric cannot tell from the original.

The names are those of `precimap/api.py`. Invariant: importing this package imports no other library; a name is looked up
when it is asked for, so that `precimap --help` need not wait seconds for torch. Not taken: a table of names and modules
here, beside the imports that type checkers read: a new name would have to be written twice.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from precimap.api import *  # noqa: F403 - the whole API, for type checkers

__version__: str

if not TYPE_CHECKING:  # a type checker would take any name for one that is found here

    def __getattr__(name: str) -> object:
        """The version, the names of the API, and modules that the API has imported, such as `precimap.errors`."""
        from importlib import import_module, metadata  # here, so that they are no names of the package

        if name == "__version__":
            return metadata.version("precimap")
        if name == "__all__" or not name.startswith("__"):
            api = vars(import_module("precimap.api"))
            if name == "__all__":
                return sorted(one for one in api if not one.startswith("_"))
            for names in (api, globals()):
                if name in names:
                    return names[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__"), "__all__", "__version__"} - {"TYPE_CHECKING"})

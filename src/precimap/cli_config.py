"""The options of a command in a YAML file: read with --config, and written into every run; and how its answer is printed.

Invariant: a file holds what would be typed, under the names that would be typed, so that a run's own file asks its question
again; what is typed beside it wins. Not taken: a schema of its own, which would have to follow every option.
"""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from precimap.cli_options import OUTPUT, option

_NOT_WRITTEN = ("config", "as_json")


def given_by(context: typer.Context, path: Path | None) -> Path | None:
    """Let the options of a file stand where none are typed. Raises BadParameter for what is no such file."""
    if path is None or context.resilient_parsing:
        return path
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(found, Mapping):
        raise typer.BadParameter(f"expected {path} to hold options such as 'margin: 0.1%', a line each")
    names = {name: parameter for parameter in context.command.params for name in _typed_as(parameter)}
    unknown = [str(name) for name in found if name not in names or names[name].name in _NOT_WRITTEN]
    if unknown:
        known = ", ".join(name for name, one in names.items() if one.name not in (*_NOT_WRITTEN, "help"))
        raise typer.BadParameter(f"{path}: {context.command.name} has no option {unknown[0]!r}; it has {known}")
    texts = {str(names[name].name): _text(names[name], value) for name, value in found.items() if value is not None}
    context.default_map = {**(context.default_map or {}), **texts}
    return path


def write_config(context: typer.Context, folder: Path) -> None:
    """The options that the command was given, into a run's directory."""
    import yaml

    from precimap.durable import write_text
    from precimap.report.run_record import SAVED

    given = {
        _typed(parameter): _plain(context.params[str(parameter.name)])
        for parameter in context.command.params
        if parameter.name not in _NOT_WRITTEN
        and parameter.name in context.params
        and getattr(context.get_parameter_source(str(parameter.name)), "name", "DEFAULT") != "DEFAULT"
    }
    write_text(folder / SAVED, yaml.safe_dump(given, sort_keys=False))


def _typed(parameter: Any) -> str:
    """Its name as it is typed, without the dashes before it."""
    return _typed_as(parameter)[0]


def _typed_as(parameter: Any) -> list[str]:
    """All its names."""
    option = parameter.param_type_name == "option"
    return [str(name).lstrip("-") for name in parameter.opts] if option else [str(parameter.name)]


def _text(parameter: Any, value: Any) -> Any:
    """As it would be typed; of an option that can be given several times, a list."""
    if isinstance(value, list | tuple):
        return [str(one) for one in value]
    if getattr(parameter, "multiple", False):
        return [str(value)]
    return value if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """As YAML holds it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


ConfigOption = Annotated[
    Path | None,
    option(
        OUTPUT,
        "Options that are not typed are taken from this YAML file, which has a line for each, such as 'margin: "
        "0.1%'. Every run keeps its own in search.yaml.",
        callback=given_by,
        is_eager=True,
    ),
]
VerboseOption = Annotated[
    bool,
    option(
        OUTPUT, "Print all that was measured, with its statistics, and not only the answer and the layers.", "--verbose"
    ),
]
WidthOption = Annotated[
    int | None,
    option(
        OUTPUT,
        "Print lines of at most this many characters. The default is the terminal's width, $COLUMNS, or 80.",
        min=40,
    ),
]

"""The folders show the architecture, and imports run one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "precimap"
FILES = sorted(SOURCE.rglob("*.py"))
BENCHES = sorted(path for path in (ROOT / "bench").glob("*.py") if path.name != "harness.py")
LISTED = [
    *sorted(path for path in (ROOT / "bench").iterdir() if path.is_dir() and not path.name.startswith(("_", "."))),
    ROOT / "tests" / "helpers",
]

# Left may never import right; parts of one step may import each other unless they are listed as strangers.
ORDER = (
    {"errors", "durable", "journal", "packed_arrays", "user_code"},
    {"numerics"},
    {"certificate"},
    {"hardware_profile"},
    {"end_to_end"},
    {"decisions", "precision_map"},
    {"layers", "fingerprints", "content", "jagged"},
    {"metrics"},
    {"per_unit"},
    {"defaults", "loaders", "targets", "task", "task_file"},
    {"data"},
    {"searching", "runtime"},
    {"report"},
    {"demos"},
    {"cli_options", "cli_config", "cli_values", "cli_ending"},
    {"cli", "api", "__init__", "__main__"},
)
STRANGERS = {("searching", "runtime"), ("runtime", "searching")}
TORCH_FREE = (
    *(
        "errors",
        "user_code",
        "packed_arrays",
        "durable",
        "journal",
        "certificate",
        "decisions",
        "precision_map",
        "hardware_profile",
        "end_to_end",
        "numerics/formats",
        "numerics/schemes",
    ),
    *(
        "layers/inventory",
        "layers/groups",
        "searching/allocation/threshold",
        "searching/allocation/ladders",
        "searching/allocation/knapsack",
        "searching/allocation/repair",
    ),
)
# Each part may also use the library of its own extra.
EXTRA_LIBRARIES = {"data": {"pyarrow"}}
CORE_LIBRARIES = {"torch", "numpy", "scipy", "pydantic", "safetensors", "typer", "rich", "yaml", "precimap"}
OPTIONAL = {"runtime/torchrec_tables.py": {"torchrec"}}  # imported inside functions, when it is asked for
LONGEST_FILE, LONGEST_FUNCTION = 320, 80


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, function-level imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "precimap":
                names.update(f"precimap.{alias.name}" for alias in node.names)
    return names


def _imports_of(node: ast.stmt) -> set[str]:
    """The libraries that a statement of a module imports itself, without what stands in its functions."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


def rank(part: str) -> int:
    for number, parts in enumerate(ORDER):
        if part in parts:
            return number
    raise AssertionError(f"{part} has no place in the import order")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    for name in imported(path):
        if name.startswith("precimap."):
            other = name.split(".")[1]
            assert rank(other) <= rank(part), f"{part} imports {other}, which is to its right"
            assert (part, other) not in STRANGERS, (
                f"{part} imports {other}; they meet in scheme, map and quantiser only"
            )


@pytest.mark.parametrize("name", TORCH_FREE)
def test_planning_needs_no_torch(name: str) -> None:
    libraries = {module.split(".")[0] for module in imported(SOURCE / f"{name}.py")}
    assert "torch" not in libraries


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_core_stands_on_few_libraries(path: Path) -> None:
    import sys

    if part_of(path) == "demos":
        return
    libraries = {module.split(".")[0] for module in imported(path)}
    optional = OPTIONAL.get(str(path.relative_to(SOURCE)), set())
    allowed = CORE_LIBRARIES | EXTRA_LIBRARIES.get(part_of(path), set()) | optional
    assert libraries - set(sys.stdlib_module_names) <= allowed
    at_import = {name for node in ast.parse(path.read_text()).body for name in _imports_of(node)}
    assert not at_import & optional


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= LONGEST_FUNCTION, f"{node.name} is too long"


def test_no_file_is_a_drawer() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "common", "misc")]


def test_every_module_says_what_it_is() -> None:
    assert not [path for path in FILES if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))]


def _listed(folder: Path) -> list[str]:
    """The files that a folder's docstring has a line for."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return re.findall(r"^(\w+\.\w+) +\S", text, flags=re.MULTILINE)


@pytest.mark.parametrize("folder", LISTED, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_folder_of_benches_or_of_the_tests_names_each_of_its_files(folder: Path) -> None:
    there = [path.name for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
    assert sorted(_listed(folder)) == sorted(there)
    assert folder.name not in ("utils", "common", "misc")


@pytest.mark.parametrize("path", BENCHES, ids=lambda p: p.stem)
def test_every_bench_uses_the_one_harness(path: Path) -> None:
    tree = ast.parse(path.read_text())
    from_harness = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "harness"
        for alias in node.names
    }
    assert {"command_line", "print_machine", "finished"} <= from_harness
    assert not {"argparse", "json"} & imported(path)
    assert f"python bench/{path.name} [--quick]" in (ast.get_docstring(tree) or ""), "make finds benches by this"


def test_the_rule_finds_a_wrong_import(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def late():\n    from precimap.searching.pipeline import search\n")
    assert "precimap.searching.pipeline" in imported(planted)
    assert rank("searching") > rank("layers")

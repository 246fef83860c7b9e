"""The folders show the architecture, and imports run one way."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
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
    {"decisions", "map_text", "precision_map"},
    {"layers", "fingerprints", "content", "jagged"},
    {"metrics"},
    {"per_unit"},
    {"defaults", "loaders", "targets", "task", "task_file"},
    {"data"},
    {"searching", "runtime"},
    {"exporting"},
    {"report"},
    {"demos"},
    {"cli_options", "cli_serving_options", "cli_config", "cli_values", "cli_ending", "cli_version", "cli_app"},
    {"cli_searching", "cli_serving"},
    {"cli", "api", "__init__", "__main__"},
)
STRANGERS = {("searching", "runtime"), ("runtime", "searching")}
# Inside of searching, in the same way.
STEPS = (
    {"pairs", "progress", "function_code"},
    {"splits"},
    {"comparison", "run", "realigner", "same_task"},
    {"latency"},
    {"allocation"},
    {"calibrate", "eligibility", "question"},
    {"subject"},
    {"preflight"},
    {"evidence"},
    {"timing"},
    {"maps"},
    {"certificate"},
    {"worth", "answer", "proof", "result"},
    {"pipeline", "planning"},
)
# With all that they import.
TORCH_FREE = (
    "errors user_code packed_arrays durable journal certificate decisions map_text precision_map hardware_profile "
    "end_to_end numerics.formats numerics.schemes layers.inventory layers.groups searching.pairs "
    "searching.latency.planned searching.latency.savings searching.latency.slower searching.allocation.ladders "
    "searching.allocation.climbing searching.allocation.knapsack searching.allocation.repair "
    "searching.allocation.threshold cli_options cli_ending"
).split()
# Each part may also use the library of its own extra.
EXTRA_LIBRARIES = {"data": {"pyarrow"}}
CORE_LIBRARIES = {"torch", "numpy", "scipy", "pydantic", "safetensors", "typer", "rich", "yaml", "precimap"}
OPTIONAL = {  # imported inside functions, when it is asked for
    "runtime/torchrec_tables.py": {"torchrec"},
    "exporting/onnx_qdq.py": {"onnx", "onnxruntime", "onnxscript"},
    "exporting/onnx_graph.py": {"onnx_ir", "onnxscript"},
    "exporting/onnx_engines.py": {"onnx", "onnxruntime", "openvino"},
}
LONGEST_FILE, LONGEST_FUNCTION = 320, 80
MOST_PARAMETERS, MOST_OF_THE_API, MOST_POSITIONAL = 5, 8, 4
# Of these each parameter is an option of the command line, or one of torch's own operator.
COMMANDS = {"cli_searching.py", "cli_serving.py"}
OPERATORS = {
    "runtime/weights/products.py",
    "runtime/x86/rows.py",
    "runtime/x86/tokens.py",
    "runtime/compiling/attention.py",
    "exporting/int8_tokens_served.py",
    "exporting/onnx_spelling.py",
}
LONG = {
    "scaled_mm": "torch's operator, less what is always the same",
    "quantize_layer": "what a layer is: name, weight, sums, scheme, range; and the grid of a rounding draw",
    "Replay._run": "a call as torch hands it out",
}
# A user writes these by position, or they are what a Scheme is.
BY_POSITION = {"Task", "Custom", "Rounding"}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> frozenset[str]:
    """Full names of all modules that a file imports, function-level imports included."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "precimap":
                names.update(f"precimap.{alias.name}" for alias in node.names)
    return frozenset(names)


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


@pytest.mark.parametrize("path", sorted((SOURCE / "searching").rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_step_of_a_search_looks_back(path: Path) -> None:
    def step(name: str) -> int:
        return next(number for number, parts in enumerate(STEPS) if name in parts)

    own = path.relative_to(SOURCE / "searching").with_suffix("").parts[0]
    if own != "__init__":
        for name in imported(path):
            if name.startswith("precimap.searching."):
                other = name.split(".")[2]
                assert step(other) <= step(own), f"{own} imports {other}, which is a later step"


def test_planning_needs_no_torch() -> None:
    """Asked of Python, so that what they import counts, too."""
    ask = f"import sys; [__import__('precimap.' + name) for name in {TORCH_FREE}]; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout == "False\n"


def _functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        name = f"{inside}{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef):
            yield name, node
        yield from _functions(node, f"{name}." if isinstance(node, ast.ClassDef | ast.FunctionDef) else inside)


def _api() -> dict[str, str]:
    """The names of the public API, and the module of each."""
    nodes = [node for node in ast.parse((SOURCE / "api.py").read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in nodes for alias in node.names}


def too_many(path: Path, tree: ast.Module) -> list[str]:
    """Functions with more parameters than a reader holds in mind. `**` of a TypedDict are options with names."""
    api, module = _api(), ".".join(("precimap", *path.relative_to(SOURCE).with_suffix("").parts))
    found = []
    for name, node in _functions(tree):
        given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([one for one in given if one not in ("self", "cls")])
        most = MOST_OF_THE_API if api.get(name) == module else MOST_PARAMETERS
        if count > most and name not in LONG:
            found.append(f"{name} has {count}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_parameters_are_few(path: Path) -> None:
    if str(path.relative_to(SOURCE)) not in {*COMMANDS, *OPERATORS}:
        assert not too_many(path, parsed(path))


def by_position(tree: ast.Module) -> list[str]:
    """Records of more than four fields that may be made by position: two floats swapped would pass the type checker."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name not in BY_POSITION:
            said = [ast.unparse(one) for one in node.decorator_list if "dataclass" in ast.unparse(one)]
            fields = [
                n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)
            ]
            if said and len(fields) > MOST_POSITIONAL and "kw_only=True" not in said[0]:
                found.append(node.name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_large_records_are_made_by_name(path: Path) -> None:
    assert not by_position(parsed(path))


def test_the_rules_of_size_find_what_breaks_them() -> None:
    planted = ast.parse(
        "@dataclass(frozen=True)\nclass Wide:\n    a: int\n    b: int\n    c: int\n    d: int\n    e: int\n"
    )
    assert by_position(planted) == ["Wide"]
    planted = ast.parse("class K:\n    def f(self, a, b, c, *, d, e, f):\n        pass\n")
    assert too_many(SOURCE / "errors.py", planted) == ["K.f has 6"]


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_folder_lists_its_files(folder: Path) -> None:
    top = folder == SOURCE  # the package's own list is the page on the architecture
    where = SOURCE.parents[1] / "docs" / "architecture.md" if top else folder / "__init__.py"
    names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    said = where.read_text()
    assert not [name for name in names if name not in said and f"`{name.removesuffix('.py')}`" not in said]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_core_stands_on_few_libraries(path: Path) -> None:
    if part_of(path) == "demos":
        return
    libraries = {module.split(".")[0] for module in imported(path)}
    optional = OPTIONAL.get(str(path.relative_to(SOURCE)), set())
    allowed = CORE_LIBRARIES | EXTRA_LIBRARIES.get(part_of(path), set()) | optional
    assert libraries - set(sys.stdlib_module_names) <= allowed
    at_import = {name for node in parsed(path).body for name in _imports_of(node)}
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
    assert not [path for path in FILES if path.stat().st_size and not ast.get_docstring(parsed(path))]


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
    tree = parsed(path)
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

"""The house rules that a machine can check: imports, sizes, signatures, names, the file map.

Modules are read with `ast`, not imported. A new room or driver gets its place in ROOMS and a line
in README's file map, and these tests say so when one is missing.
"""

import ast
import re
import runpy
import statistics
import tomllib
from pathlib import Path

import pytest

from lepton_jax.compat import OLDEST_JAX

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = CHECKOUT / "lepton_jax"

# Top to ground; names on one line are on one floor. A room may import from lines below its own.
ROOMS = [
    "run compress plan bench tune evaluation",
    "cli",
    "api",
    "serving",
    "jobs",
    "optimizer",
    "planning",
    "distributed",
    "engine",
    "compression",
    "checkpoints",
    "models",
    "text",
    "kernels",
    "sharding",
    "tensors",
    "html",
    "telemetry",
    "compile_cache",
    "kept_programs",
    "config compat host_memory whole_file",
    "config_compression",
    "config_jobs",
    "config_fields",
]
FLOORS = {room: floor for floor, line in enumerate(reversed(ROOMS)) for room in line.split()}
FLOORS["__init__"] = FLOORS["api"]  # the package's own names are those of api.py

FILE_LINES, FILE_MEDIAN, FUNCTION_LINES, ARGUMENTS, POSITIONAL = 600, 180, 60, 8, 4
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "manager"}
PEERS = {"torch", "transformers", "tensorflow", "llama_cpp", "vllm"}

SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree, rooms):
    """(line, dotted module) of every import, those in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "lepton_jax":  # names of rooms, or of the package itself
                names = (alias.name for alias in node.names)
                yield from (
                    (node.lineno, f"{module}.{name if name in rooms else '__init__'}")
                    for name in names
                )
            else:
                yield node.lineno, module


def upward(tree, room, floors):
    """What `room` imports from its own floor or above, outside itself, and relative imports."""
    found = []
    for line, module in imported(tree, floors):
        if module.startswith("."):
            found.append(f"line {line}: relative import; write lepton_jax.<room>")
        parts = module.split(".")
        if parts[0] != "lepton_jax":
            continue
        target = parts[1] if len(parts) > 1 else "__init__"
        if target not in floors:
            found.append(f"line {line}: lepton_jax.{target} is in no room")
        elif target != room and floors[target] >= floors.get(room, 0) and room != "__init__":
            found.append(f"line {line}: {room} imports {target}, which is not below it")
    return found


def functions(tree):
    """(qualified name, node, is it nested in a function) of every def."""

    def visit(node, prefix, nested):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield prefix + child.name, child, nested
                yield from visit(child, f"{prefix}{child.name}.", True)
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.", nested)
            else:
                yield from visit(child, prefix, nested)

    yield from visit(tree, "", False)


def by_position(node):
    own = node.args.posonlyargs + node.args.args
    return [argument.arg for argument in own if argument.arg not in ("self", "cls")]


def oversized(tree):
    """Functions with too many lines or arguments."""
    found = []
    for name, node, _ in functions(tree):
        count = len(by_position(node)) + len(node.args.kwonlyargs)
        lines = node.end_lineno - node.lineno + 1
        where = f"line {node.lineno}: {name}"
        if lines > FUNCTION_LINES:
            found.append(f"{where} has {lines} lines; at most {FUNCTION_LINES}")
        if count > ARGUMENTS:
            found.append(f"{where} has {count} arguments; at most {ARGUMENTS}")
    return found


def unnamed(tree):
    """Functions that take more than four arguments by position.

    Left out are Python's own protocols (`__exit__`) and functions within functions (what jax calls
    back): others fix their signatures.
    """
    found = []
    for name, node, nested in functions(tree):
        protocol = node.name.startswith("__") and node.name not in ("__init__", "__call__")
        count = len(by_position(node))
        if count > POSITIONAL and not (nested or protocol):
            found.append(
                f"line {node.lineno}: {name} takes {count} by position; name all after four"
            )
    return found


def report(check):
    """One line for each finding of `check(path, tree)` over the package."""
    return "\n".join(
        f"{path.relative_to(CHECKOUT)} {finding}"
        for path, tree in TREES.items()
        for finding in check(path, tree)
    )


def test_every_module_is_in_a_room():
    strangers = sorted({room_of(path) for path in SOURCES} - set(FLOORS))
    assert not strangers, f"give these a line in ROOMS and in README's file map: {strangers}"


def test_imports_go_down_only():
    found = report(lambda path, tree: upward(tree, room_of(path), FLOORS))
    assert not found, found


def test_no_peer_is_imported():
    found = report(
        lambda path, tree: [
            f"line {line}: imports {module}"
            for line, module in imported(tree, FLOORS)
            if module.split(".")[0] in PEERS
        ]
    )
    assert not found, found


def test_functions_are_small():
    found = report(lambda path, tree: oversized(tree))
    assert not found, found


def test_arguments_after_four_are_named():
    found = report(lambda path, tree: unnamed(tree))
    assert not found, f"{len(found.splitlines())} functions:\n{found}"


def lines_of(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_are_small():
    everywhere = [
        path
        for folder in ("lepton_jax", "tests", "scripts", "configs")
        for path in (CHECKOUT / folder).rglob("*.py")
    ]
    large = {str(p.relative_to(CHECKOUT)): lines_of(p) for p in everywhere}
    large = {name: lines for name, lines in large.items() if lines > FILE_LINES}
    assert not large, f"at most {FILE_LINES} lines a file: {large}"


def test_the_median_file_is_short():
    median = statistics.median(lines_of(p) for p in SOURCES if p.name != "__init__.py")
    print(f"median file of lepton_jax: {median:g} lines")
    assert median <= FILE_MEDIAN


def test_no_module_has_an_empty_name():
    named = {part.removesuffix(".py"): path for path in SOURCES for part in path.parts[-2:]}
    found = {name: str(path) for name, path in named.items() if name in BANNED_NAMES}
    assert not found, f"name them after what they hold: {found}"


def test_modules_say_what_they_hold():
    found = report(lambda path, tree: [] if ast.get_docstring(tree) else ["has no docstring"])
    assert not found, found


def file_map():
    """Names in README's file map: the first word of each line of its block."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## File map\n.*?```\n(.*?)```", text, re.DOTALL)
    assert block, "README.md has no section '## File map' with a block"
    return re.findall(r"^ *([\w./]+)", block[1], re.MULTILINE)


def test_file_map_names_what_exists():
    missing = [
        name
        for name in file_map()
        if not (PACKAGE / name).exists() and not (CHECKOUT / name).exists()
    ]
    assert not missing, f"README's file map names what isn't there: {missing}"


def test_file_map_is_whole():
    named = {name.rstrip("/") for name in file_map()}
    rooms = {
        path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))
    }
    left_out = sorted(rooms - named - {"__init__.py"})
    assert not left_out, f"README's file map lacks: {left_out}"


def test_config_table_is_todays():
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    script = runpy.run_path(str(CHECKOUT / "scripts" / "readme_config.py"))
    assert script["with_table"](text) == text, "run scripts/readme_config.py"


def test_dependencies_are_ranges_and_jax_is_the_oldest_supported():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    pinned = [
        need for group in groups for need in group if re.search(r"[=~]=|<", need.split(";")[0])
    ]
    assert not pinned, f"installing must leave a user's packages alone: {pinned}"
    oldest = ".".join(map(str, OLDEST_JAX))
    assert f"jax>={oldest}" in project["dependencies"], f"compat.py has OLDEST_JAX {oldest}"


@pytest.mark.parametrize(
    ("room", "code", "finding"),
    [
        ("models", "from lepton_jax.engine.loop import Engine", "models imports engine"),
        ("models", "def f():\n    import lepton_jax.engine.loop", "models imports engine"),
        ("config", "from lepton_jax import telemetry", "config imports telemetry"),
        ("jobs", "from lepton_jax import LeptonEngine", "jobs imports __init__"),
        ("text", "from .spm import encode", "relative"),
        ("text", "import lepton_jax.cellar", "in no room"),
        ("engine", "from lepton_jax.engine import steps\nfrom lepton_jax import compat", ""),
    ],
)
def test_upward_imports_are_seen(room, code, finding):
    found = "\n".join(upward(ast.parse(code), room, FLOORS))
    assert finding in found and bool(finding) == bool(found)


@pytest.mark.parametrize(
    ("code", "finding"),
    [
        ("def f(a, b, c, d, e): pass", "name all after four"),
        ("class A:\n    def f(self, a, b, c, d, e): pass", "name all after four"),
        ("class A:\n    def f(self, a, b, *, c, d): pass", ""),
        ("def f(a, b, *, c, d, e, g, h, i, j): pass", "9 arguments"),
        ("def f():\n" + "    pass\n" * 60, "61 lines"),
        ("def f():\n    def body(i, j, k): pass", ""),
    ],
)
def test_bad_signatures_are_seen(code, finding):
    tree = ast.parse(code)
    found = "\n".join(oversized(tree) + unnamed(tree))
    assert finding in found and bool(finding) == bool(found)

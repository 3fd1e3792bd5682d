"""The modules of the package only import from lower layers, without cycles."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[1] / "src" / "latte_flow_hf"
COMMAND = SOURCE.parent / "latte_flow_cli"

# From the lowest to the highest. Subpackages of the same layer do not import each other.
LAYERS = (
    ("version", "files", "folder_lock", "tinyworld"),
    ("modeling",),
    ("schedulers",),
    ("pipelines",),
    ("checkpoints", "cards"),
    ("training", "evaluation", "conversion"),
    ("reproduction",),
    ("publishing", "serving", "app"),
    ("cli", "transformers_cli"),
)


def name_of(path: Path) -> str:
    """The dotted name of a module within the package; empty for the package itself."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports, inside functions too."""
    package = ["latte_flow_hf", *name.split(".")] if name else ["latte_flow_hf"]
    if MODULES[name].name != "__init__.py":
        package = package[:-1]
    imported = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            imported |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    inside = {
        module.removeprefix("latte_flow_hf").lstrip(".") for module in imported if module.startswith("latte_flow_hf")
    }
    return (inside & MODULES.keys()) - {name}


def layer_of(name: str) -> int:
    subpackage = name.split(".")[0]
    layers = [index for index, subpackages in enumerate(LAYERS) if subpackage in subpackages]
    assert layers, f"{subpackage} has no layer: add it to LAYERS."
    return layers[0]


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_are_from_lower_layers(name):
    subpackage = name.split(".")[0]
    for other in imports_of(name):
        # The package itself imports from all layers, so only the highest one may import it.
        allowed = layer_of(name) == len(LAYERS) - 1 if not other else layer_of(other) < layer_of(name)
        assert allowed or other.split(".")[0] == subpackage, f"{name} imports {other or 'latte_flow_hf'}"


def test_there_are_no_import_cycles():
    try:
        TopologicalSorter({name: imports_of(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_imports_are_found():
    assert {"modeling.context", "files", "training.data"} <= imports_of("training.cache")
    assert "modeling.configuration_latte_flow" in imports_of("")


def test_the_command_imports_the_package_only_inside_its_verbs():
    """Importing any part of the package takes seconds, which help and usage errors would wait for."""
    allowed = {
        "collections.abc",
        "contextlib",
        "functools",
        "importlib",
        "json",
        "pathlib",
        "re",
        "sys",
        "time",
        "typer",
        "typing",
    }
    for path in COMMAND.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module in allowed


def test_test_files_have_different_names():
    """pytest imports them by name alone, and stops at the second one."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))

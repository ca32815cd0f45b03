"""Who may import whom: the arrows of the architecture, read from the source with `ast`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gemmaqat"

# Each part of the package and the parts it may import, itself aside. A dotted name allows that one
# module of a part, not the whole of it.
BELOW_TRAINING = {
    "json_file",
    "config",
    "models",
    "quantization",
    "packed",
    "data",
    "kernels",
    "typing",
}
ARROWS = {
    "typing": set(),
    "json_file": set(),
    "kernels": set(),
    "packed": {"kernels", "typing"},
    "models": {"kernels", "typing"},
    "quantization": {"packed", "typing", "kernels.layout"},  # the names of level grids
    "data": {"typing", "json_file"},
    "config": {
        "models.config",
        "models.kv_codes",
        "models.sizes",
        "quantization.rule",
        "quantization.rules",
        "quantization.recipes",
        "data.config",
        "json_file",
    },
    "generation": {"config", "models", "quantization", "packed", "data", "typing"},
    "interop": {"json_file", "config", "models", "quantization", "packed", "planning", "typing"},
    "planning": {"config", "models", "quantization", "packed", "typing"},
    "evaluation": BELOW_TRAINING | {"generation"},
    "training": BELOW_TRAINING | {"evaluation.metrics", "interop"},
    "compare": BELOW_TRAINING | {"training", "evaluation", "interop", "generation", "planning"},
}
MAY_IMPORT_ALL = {"main", "commands", "shipping", "__main__", "__init__"}
# Imported by these alone.
ENTRY_POINTS = {"main": {"__main__"}, "commands": {"main", "shipping"}, "shipping": {"main"}}


def _imports(path: Path) -> set[str]:
    """Dotted names of our own modules that a file imports, without the package's name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the package"
            module = node.module or ""
            # `from gemmaqat.models import sizes` imports a module; `from ... import f` a name.
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("gemmaqat.") for name in names if name.startswith("gemmaqat.")}


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    part = _part(path)
    imported = _imports(path)
    for entry, importers in ENTRY_POINTS.items():
        if any(name.split(".")[0] == entry for name in imported):
            assert part in importers, f"{path.name} imports gemmaqat.{entry}, which only runs verbs"
    if part in MAY_IMPORT_ALL:
        return
    assert part in ARROWS, f"{part}: a new part of the package; give it its arrows here"
    allowed = ARROWS[part] | {part}
    for name in imported:
        prefixes = {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 2)}
        assert prefixes & allowed, f"{path.name} imports gemmaqat.{name}, which {part} may not"


def test_the_arrows_have_no_cycle():
    def reachable(part: str, seen: frozenset[str]) -> None:
        assert part not in seen, f"{part} reaches itself through {sorted(seen)}"
        for target in ARROWS[part]:
            # An arrow to one named module (`evaluation.metrics`) is judged by what it imports.
            if "." not in target:
                reachable(target, seen | {part})

    for part in ARROWS:
        reachable(part, frozenset())


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.glob("*/**/__init__.py")), ids=lambda p: p.parent.name
)
def test_subpackages_import_nothing_by_themselves(path):
    body = ast.parse(path.read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr), (
        f"{path}: only a docstring belongs here"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.name)
def test_experiments_import_only_the_config(path):
    imported = {
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"ml_collections", "gemmaqat.config"}, sorted(imported)

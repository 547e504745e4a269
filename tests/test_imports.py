"""Dependency direction between packages, read from the import statements."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cnntrain"
LAYERS = [  # a module may import its own package and earlier layers of this list
    {"errors"},
    {"memory", "io", "transfer", "randomness", "types"},
    {"config", "plots", "summary"},
    {"augment", "data", "models", "tasks"},
    {"train"},
    {"config.compose", "config.yaml_files"},
    {"report"},
    {"checks", "sweep", "benchmark"},
    {"commands"},
    {"cli"},
]
MAY_IMPORT_HYDRA = {"cli", "config", "config.compose", "config.yaml_files", "commands"}


def unit(module: str) -> str:
    """Return the entry of LAYERS that a dotted name below `cnntrain` belongs to."""
    parts = module.removeprefix("cnntrain").lstrip(".").split(".")
    two = ".".join(parts[:2])
    return two if any(two in layer for layer in LAYERS) else parts[0]


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, except under `if TYPE_CHECKING`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


FILES = [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name not in ("__init__.py", "__main__.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_only_lower_layers(path: Path) -> None:
    own = unit(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    assert own in layer, f"{own} is a new package: add it to LAYERS"
    for module in imports(path):
        if module.split(".")[0] == "cnntrain" and (other := unit(module)) not in ("", own):
            allowed = layer[other] < layer[own] or own.split(".")[0] == other.split(".")[0]
            assert allowed, f"{own} must not import {other} ({module})"
        if module.split(".")[0] in ("hydra", "omegaconf"):
            assert own in MAY_IMPORT_HYDRA, f"{own} must not import Hydra"


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from cnntrain.cli import main; main(['--help']); main(['overfit', '--help']);"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'sklearn', 'tensorboard'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_training_does_not_import_torchvision() -> None:
    code = "import sys, cnntrain.commands.train; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

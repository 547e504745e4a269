"""The rooms and who may lean on whom, read from the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "cnntrain"
FLOORS = [  # each may import what stands before it, and itself; what shares a line may not import one another
    {"command_line", "errors", "findings", "heap"},
    {"files", "transfer"},
    {"streams"},
    {"settings", "randomness", "space", "spec", "tensor_file", "yaml_files"},
    {"tasks", "augment", "data", "models"},
    {"engine", "anatomy", "report"},
    {"checks", "build", "expectations", "saved_content"},
    {"config"},
    {"assembly"},
    {"saved", "processes"},
    {"resume", "training"},
    {"cli"},
    {"comparison"},
    {"fresh", "sweep"},
    {"commands"},
]
SPEAK_HYDRA = {"cli", "config", "commands"}


def room(module: str) -> str:
    return module.removeprefix("cnntrain").lstrip(".").split(".")[0]


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere but for type checking."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


FILES = [
    p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name not in ("__init__.py", "__main__.py")
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert mine in floor, f"{mine} is a new room: give it a floor"
    for module in imports(path):
        if module.startswith("cnntrain"):
            other = room(module)
            if not other or other == mine:
                continue
            assert floor[other] < floor[mine], f"{mine} must not import {other}"
        if module.split(".")[0] in ("hydra", "omegaconf"):
            assert mine in SPEAK_HYDRA, f"{mine} must not know Hydra"


def test_the_command_line_answers_without_torch() -> None:
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

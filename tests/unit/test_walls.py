import ast
import subprocess
import sys
from pathlib import Path

import pytest

import phibatch

ROOT = Path(phibatch.__file__).parent
ENGINES = {"onnxruntime", "onnxruntime_genai", "transformers", "torch", "tokenizers"}
FORBIDDEN = {
    "errors.py": None,
    "contract.py": None,
    "config.py": {"pyspark", "mlflow", "phibatch.model", "phibatch.job"},
    "model": {"pyspark", "phibatch.job", "phibatch.config", "phibatch.cli"},
    "job": {*ENGINES, "phibatch.model.engine", "phibatch.model.chat", "phibatch.model.pyfunc", "phibatch.cli"},
}
"""What each room must not import; None is everything outside the standard library, phibatch's own included."""


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively, past the eye of this test"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def trespasses(file: Path, forbidden: set[str] | None) -> set[str]:
    if forbidden is None:
        return {name for name in imports(file) if name.split(".")[0] not in sys.stdlib_module_names}
    return {name for name in imports(file) for wall in forbidden if name == wall or name.startswith(f"{wall}.")}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_each_room_keeps_to_its_side_of_the_wall(room):
    """No module imports what its folder may not know."""
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): trespasses(file, FORBIDDEN[room]) for file in files}
    assert {file: names for file, names in found.items() if names} == {}


def test_the_wall_is_seen_by_the_test(tmp_path):
    """A module that imports Spark from the model's side is caught, however it spells it."""
    for line in ("import pyspark.sql", "from pyspark import sql", "def f():\n    from phibatch import job"):
        file = tmp_path / "module.py"
        file.write_text(line)
        assert trespasses(file, FORBIDDEN["model"])


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("phibatch.job.pipeline", ENGINES - {"tokenizers"}),
        ("phibatch.model.pyfunc", ENGINES),
        ("phibatch.cli", {"pyspark", "mlflow"}),
    ],
)
def test_importing_a_room_loads_nothing_of_the_other_side(module, absent):
    """What a module imports brings none of the other side's libraries with it, by no detour."""
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

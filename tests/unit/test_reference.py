import importlib.util
from pathlib import Path

from phibatch.config import JobConfig

ROOT = Path(__file__).parents[2]


def test_the_reference_is_of_this_configuration():
    """docs/configuration.md is what `make docs` writes, and says something of every key."""
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "jobs" / "write_reference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "configuration.md").read_text() == script.render_reference()
    for section in JobConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, name

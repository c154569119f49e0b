"""Writes docs/configuration.md from the configuration itself: `make docs`."""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from phibatch.config import InputColumns, JobConfig
from phibatch.contract import NUMBERS

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"

HEAD = """# Configuration

A job's settings, in a YAML file of sections; [`conf/batch.yaml`](../conf/batch.yaml) is one to start from.
Each can be set on the command line too, as YAML: `--set section.key=value`. Unknown keys and bad values are refused.
This page is made from the code by `make docs`.
"""


def render_reference() -> str:
    """The page."""
    parts = [HEAD]
    for section, field in JobConfig.model_fields.items():
        model: Any = field.annotation
        parts.append(f"## {section}\n\n{_flow(model.__doc__)}\n\n{_table(model, section)}")
        if section == "input":
            names = "`, `".join(name for name in InputColumns.model_fields if name != "n")
            parts.append(
                f"`columns` has the keys `{names}`, each with its own name as the default, and `n`, with none.\n"
            )
    return "\n".join(parts)


def _table(model: type[BaseModel], section: str) -> str:
    lines = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        lines.append(
            f"| `{name}` | {_default(field)} | {_kind(field, section, name)} | {_flow(field.description or '')} |"
        )
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    match value:
        case BaseModel():
            return "see below"
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case () | {}:
            return "none"
    return f"`{value}`"


def _kind(field: FieldInfo, section: str, name: str) -> str:
    if section == "generation" and name in NUMBERS:
        return str(NUMBERS[name])
    options = [option for each in (field.annotation, *get_args(field.annotation)) for option in get_args(each)]
    words = [f"`{option}`" for option in options if isinstance(option, str)]
    if words:
        return ", ".join(words)
    if field.annotation is not None and hasattr(field.annotation, "__members__"):
        return ", ".join(f"`{each}`" for each in field.annotation)
    bounds = {key: value for rule in _rules(field) for key, value in _bounds(rule).items()}
    low = f"from {bounds['ge']:g}" if "ge" in bounds else f"above {bounds['gt']:g}" if "gt" in bounds else ""
    high = f"up to {bounds['le']:g}" if "le" in bounds else ""
    return " ".join(word for word in (_type(field), low, high) if word)


def _rules(field: FieldInfo) -> list[Any]:
    inner = [rule for option in get_args(field.annotation) for rule in getattr(option, "__metadata__", ())]
    return [*field.metadata, *(rule for info in inner for rule in getattr(info, "metadata", ()))]


def _bounds(rule: Any) -> dict[str, float]:
    return {name: getattr(rule, name) for name in ("ge", "gt", "le") if getattr(rule, name, None) is not None}


def _type(field: FieldInfo) -> str:
    text = str(field.annotation)
    names = {"bool": "true or false", "tuple": "a list", "dict": "a mapping", "InputColumns": "a mapping"}
    names |= {"ByteSize": "a size", "int": "a whole number", "float": "a number", "str": "text"}
    return next(word for name, word in names.items() if name in text)


def _flow(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(render_reference(), encoding="utf-8")

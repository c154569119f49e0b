"""Prompts that are registered in MLflow: the version behind a URI, as a text that the job can work with."""

import re

import mlflow
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from phibatch.config import InputConfig
from phibatch.errors import InputError

SCHEME = "prompts:/"
VARIABLE = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")
"""MLflow's `{{name}}`."""


def resolve_prompts(config: InputConfig) -> tuple[InputConfig, str | None]:
    """The input with the texts of the registered prompts that `template` and `system` name.

    Returns:
        The configuration, and the versions that the texts are of, such as `prompts:/summarise/3`; None where it names
        none.

    Raises:
        InputError: there is no such prompt, or it is a conversation.
    """
    texts, versions = {}, []
    for name in ("template", "system"):
        uri = getattr(config, name)
        if uri is not None and uri.startswith(SCHEME):
            texts[name], version = _load(uri, f"input.{name}")
            versions.append(version)
    if "template" in texts:
        texts["template"] = _as_template(texts["template"], f"input.template {config.template}")
    if "system" in texts and VARIABLE.search(texts["system"]):
        raise InputError(f"input.system {config.system} has variables, and a system message has no columns")
    return config.model_copy(update=texts), ", ".join(versions) or None


def _load(uri: str, key: str) -> tuple[str, str]:
    try:
        prompt = mlflow.genai.load_prompt(uri)
    except MlflowException as error:
        raise InputError(
            f"{key} {uri} is not known at {mlflow.get_tracking_uri()}: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(prompt.template, str):
        raise InputError(f"{key} {uri} is a conversation, and must be a text")
    return prompt.template, f"{SCHEME}{prompt.name}/{prompt.version}"


def _as_template(text: str, key: str) -> str:
    """MLflow's `{{column}}` as the job's `{column}`; single braces are braces."""
    if "{%" in text or "{#" in text:
        raise InputError(f"{key} is a Jinja2 template: it may only hold {{{{column}}}}")
    parts = VARIABLE.split(text)
    template = "".join(
        f"{{{part}}}" if place % 2 else part.replace("{", "{{").replace("}", "}}") for place, part in enumerate(parts)
    )
    try:
        InputConfig(path=key, template=template)
    except ValidationError as error:
        raise InputError(f"{key} can not be used: it may only hold {{{{column}}}}") from error
    return template

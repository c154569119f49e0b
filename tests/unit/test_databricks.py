"""The bundle of conf/databricks, loaded as Databricks' own library knows it, without a workspace."""

from copy import deepcopy
from pathlib import Path

import click
import pytest
import yaml
from databricks.bundles.jobs import Job
from pydantic import BaseModel, ConfigDict

from phibatch.cli import main
from phibatch.config import build_config

FOLDER = Path(__file__).parents[2] / "conf" / "databricks"
JOB = yaml.safe_load((FOLDER / "resources" / "phibatch.yml").read_text())["resources"]["jobs"]["phibatch"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Variable(Strict):
    description: str
    default: str | int | None = None


class Artifact(Strict):
    type: str
    path: str
    build: str


class Workspace(Strict):
    root_path: str


class Target(Strict):
    mode: str
    default: bool = False
    workspace: Workspace | None = None
    variables: dict[str, str | int]


class Bundle(Strict):
    """The parts of a bundle's root that this one has: https://docs.databricks.com/dev-tools/bundles/settings."""

    bundle: dict[str, str]
    include: list[str]
    artifacts: dict[str, Artifact]
    variables: dict[str, Variable]
    targets: dict[str, Target]


BUNDLE = Bundle.model_validate(yaml.safe_load((FOLDER / "databricks.yml").read_text()))


def fields(value, path=()):
    """The path of every mapping in a document."""
    if isinstance(value, dict):
        yield path
        for key, each in value.items():
            yield from fields(each, (*path, key))
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from fields(each, (*path, place))


FREE = {"spark_conf", "spark_env_vars"}
"""Mappings whose keys are Spark's and the system's."""


def test_every_field_of_the_job_is_known():
    """Databricks' library takes the whole job, and gives back what is in the file."""
    assert Job.from_dict(JOB).as_dict() == JOB


@pytest.mark.parametrize("path", [path for path in fields(JOB) if not FREE & set(path)], ids=str)
def test_a_wrong_field_is_found(path):
    """Wherever in the job it is."""
    job = deepcopy(JOB)
    place = job
    for part in path:
        place = place[part]
    place["colour"] = "red"
    with pytest.raises((TypeError, ValueError), match="colour"):
        Job.from_dict(job)


def test_each_target_sets_what_has_no_default():
    """No variable is left open, none is set that is not there, and the job reads no other."""
    needed = {name for name, variable in BUNDLE.variables.items() if variable.default is None}
    for target in BUNDLE.targets.values():
        assert needed <= set(target.variables) <= set(BUNDLE.variables)
    text = (FOLDER / "resources" / "phibatch.yml").read_text()
    assert {name for name in BUNDLE.variables if f"${{var.{name}}}" in text} == set(BUNDLE.variables)


def test_the_parameters_are_the_commands_own():
    """What the task is given is a command line of phibatch's, and makes a configuration once it is filled in."""
    values = {each["name"]: str(each["default"]) for each in JOB["parameters"]}
    values.update(
        input="main.a.prompts", output="main.a.responses", model="models:/m@a", config="b.yaml", work_path="w"
    )
    parameters = list(JOB["tasks"][0]["python_wheel_task"]["parameters"])
    for name, value in values.items():
        parameters = [each.replace(f"{{{{job.parameters.{name}}}}}", value) for each in parameters]
    assert not [each for each in parameters if "{{" in each]
    command = main.get_command(click.Context(main), parameters[0])
    given = command.make_context("run", parameters[1:]).params
    document = {"model": {"uri": given["model_uri"]}}
    for setting in given["settings"]:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        document.setdefault(section, {})[name] = yaml.safe_load(value)
    config = build_config(document)
    assert (config.input.table, config.output.table) == ("main.a.prompts", "main.a.responses")


def test_the_entry_point_is_the_wheels():
    """The task starts what the wheel calls `phibatch`."""
    from importlib.metadata import entry_points

    task = JOB["tasks"][0]["python_wheel_task"]
    (found,) = entry_points(group="console_scripts", name=task["entry_point"])
    assert found.dist.name == task["package_name"]

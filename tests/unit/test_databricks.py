"""The bundle of conf/databricks, loaded as Databricks' own library knows it, without a workspace."""

import re
from copy import deepcopy
from pathlib import Path

import click
import pytest
import yaml
from databricks.bundles.jobs import Job
from pydantic import BaseModel, ConfigDict

from phibatch.cli import _read_config, main

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


@pytest.mark.parametrize("target", BUNDLE.targets)
def test_the_parameters_are_the_commands_own(target, bundle_command):
    """The task's parameters are a command line of phibatch's, which with the file it names is a whole configuration."""
    words = bundle_command(target)
    assert not [word for word in words if re.search(r"\{\{|\$\{", word)]
    command = main.get_command(click.Context(main), words[0])
    given = command.make_context(words[0], words[1:]).params
    assert given["config_file"] == FOLDER / "batch.yaml"
    config = _read_config(given)
    variables = BUNDLE.targets[target].variables
    assert (config.input.table, config.output.table) == (variables["input"], variables["output"])
    assert config.output.work_path == variables["work_path"]
    assert config.output.format == "delta"


def test_every_setting_of_the_jobs_file_has_its_reason():
    """Above each setting of batch.yaml stands a comment."""
    lines = (FOLDER / "batch.yaml").read_text().splitlines()
    settings = [place for place, line in enumerate(lines) if re.match(r"  +\w+:", line)]
    assert settings
    assert all(re.match(r"  +# ", lines[place - 1]) for place in settings)


def test_the_entry_point_is_the_wheels():
    """The task starts what the wheel calls `phibatch`."""
    from importlib.metadata import entry_points

    task = JOB["tasks"][0]["python_wheel_task"]
    (found,) = entry_points(group="console_scripts", name=task["entry_point"])
    assert found.dist.name == task["package_name"]

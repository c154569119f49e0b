"""`phibatch ...`: the command line. No logic; every command is one call into the package."""

import logging
import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import phibatch
from phibatch.config import JobConfig, read_config
from phibatch.contract import GenerationParams
from phibatch.errors import ConfigError, PhibatchError

MODEL_OPTIONS = [
    click.option("--model-dir", type=click.Path(path_type=Path), help="A model folder on this machine."),
    click.option("--hf-repo", help="A Hugging Face repository to download the folder from, instead."),
    click.option("--subfolder", help="The folder within --hf-repo."),
    click.option("--revision", help="The branch, tag or commit of --hf-repo."),
    click.option("--name", required=True, help="The registered model's name."),
    click.option("--alias", help="An alias for the new version, such as champion."),
    click.option("--max-tokens", type=int, help="The limit where neither row nor job sets one (300)."),
    click.option("--temperature", type=float, help="The temperature where neither row nor job sets one (0: greedy)."),
    click.option(
        "--chat-template", type=click.Path(path_type=Path), metavar="FILE", help="A chat template, instead of its own."
    ),
]

JOB_OPTIONS = [
    click.option("--config", "config_file", type=click.Path(path_type=Path), help="The job's YAML file."),
    click.option(
        "--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable."
    ),
    click.option("--input", "input_path", help="Override input.path."),
    click.option("--output", "output_path", help="Override output.path."),
    click.option("--model", "model_uri", help="Override model.uri."),
]

DEFAULT_SAMPLE = 48
"""Rows of a calibration: three times the slots of an engine."""


class _Commands(click.Group):
    """Ends the process with the exit code and the one sentence of what went wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PhibatchError as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"phibatch: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(phibatch.__version__, prog_name="phibatch")
@click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own logs.")
def main(debug: bool) -> None:  # noqa: FBT001 - click passes options by name
    """Batch inference with Phi-3 on Apache Spark, on CPU executors.

    Exit codes: 0 done; 1 the job failed; 2 bad configuration or input, nothing was generated; 3 done, but more rows
    failed than job.max_error_rate.
    """
    if not debug:
        # MLflow reads them when it is first imported, which is after this.
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        # Its own seven retries of a server that is not there take minutes, without a word.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        logging.getLogger("alembic").setLevel(logging.ERROR)


@main.group()
def log() -> None:
    """Log a model to MLflow and register it."""


def _model_options(command: Any) -> Any:
    for option in reversed(MODEL_OPTIONS):
        command = option(command)
    return command


@log.command("onnx")
@_model_options
def log_onnx(name: str, alias: str | None, **options: Any) -> None:
    """Log an onnxruntime-genai folder as a pyfunc model; the last line printed is its URI."""
    from phibatch.model import registry

    defaults = _defaults(options)
    registry.check_names(name, alias)
    folder = _folder(options)
    registry.use_default_tracking()
    _say_logged(registry.log_onnx(folder, name, alias, defaults, options["chat_template"]))


@log.command("transformers")
@_model_options
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="The type to compute in, instead of the checkpoint's own.",
)
def log_transformers(name: str, alias: str | None, dtype: str | None, **options: Any) -> None:
    """Log a transformers checkpoint for chat with MLflow's transformers flavour; the last line printed is its URI."""
    from phibatch.model import checkpoint, registry

    defaults = _defaults(options)
    registry.check_names(name, alias)
    if options["hf_repo"]:
        checkpoint.check_extra()  # before gigabytes are downloaded
    folder = _folder(options, checkpoint.FILES)
    registry.use_default_tracking()
    _say_logged(registry.log_transformers(folder, name, alias, defaults, dtype, options["chat_template"]))


def _say_logged(model: Any) -> None:
    from phibatch.model.chat import NO_SYSTEM

    if not model.takes_system:
        click.echo(f"phibatch: {NO_SYSTEM}", err=True)
    click.echo(model.uri)


def _defaults(options: dict[str, Any]) -> GenerationParams:
    given = {name: options[name] for name in ("max_tokens", "temperature") if options[name] is not None}
    try:
        return GenerationParams(**given)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _folder(options: dict[str, Any], files: tuple[str, ...] | None = None) -> Path:
    from phibatch.model import hub
    from phibatch.model.staging import read_template

    if (options["model_dir"] is None) == (options["hf_repo"] is None):
        raise ConfigError("exactly one of --model-dir and --hf-repo must be given")
    if options["chat_template"] is not None:
        read_template(options["chat_template"])  # before gigabytes are downloaded
    model_dir: Path | None = options["model_dir"]
    return model_dir or hub.download_folder(options["hf_repo"], options["subfolder"], options["revision"], files)


def _job_options(command: Any) -> Any:
    for option in reversed(JOB_OPTIONS):
        command = option(command)
    return command


@main.command()
@_job_options
@click.option("--show", type=click.IntRange(min=0), default=0, help="Print this many answers at the end.")
def run(show: int, **options: Any) -> None:
    """Answer every row of a table."""
    config = _read_config(options)

    from phibatch.job.console import Reporter
    from phibatch.job.output import read_responses
    from phibatch.job.pipeline import run_batch

    spark = _open_session(config.job.name)
    reporter = Reporter(Console())
    run_batch(spark, config, reporter)
    reporter.show_answers(read_responses(spark, config.output), show)


@main.command()
@_job_options
@click.option(
    "--calibrate",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=DEFAULT_SAMPLE,
    metavar="[ROWS]",
    help=f"Generate for a sample of so many rows ({DEFAULT_SAMPLE}) to estimate time and cost.",
)
@click.option("--executors", type=click.IntRange(min=1), help="Estimate for so many executors, ...")
@click.option("--cores", type=click.IntRange(min=1), help="... of so many cores each, instead of those there are.")
def validate(calibrate: int | None, executors: int | None, cores: int | None, **options: Any) -> None:
    """Say what a run would do, without doing it.

    Nothing is written, and nothing generated but a sample with --calibrate. Ends with exit code 2 when the run would
    fail.
    """
    config = _read_config(options)

    from phibatch.job.console import Reporter
    from phibatch.job.validate import validate_job

    spark = _open_session(config.job.name)
    validation = validate_job(spark, config, calibrate, executors, cores)
    Reporter(Console()).say_validation(validation)
    validation.check()


@main.command()
@click.argument("output")
@click.option("--format", "file_format", default="parquet", help="The format of the output's files.")
@click.option("--run-id", help="Only of the rows that this run wrote.")
@click.option("--hourly-cost", type=click.FloatRange(min=0), help="What the whole cluster costs an hour.")
@click.option("--compare", "other", metavar="OUTPUT", help="Another output to compare it with, in the report.")
def report(output: str, file_format: str, run_id: str | None, hourly_cost: float | None, other: str | None) -> None:
    """Write the report of an output (again), to OUTPUT_report; the last line printed is where."""
    from phibatch.job.publish import find_output, publish_report

    spark = _open_session("phibatch report")
    found = find_output(spark, output, file_format)
    compared = find_output(spark, other, file_format) if other else None
    click.echo(publish_report(spark, found, run_id=run_id, hourly_cost=hourly_cost, other=compared))


@main.command()
@click.argument("output_a")
@click.argument("output_b")
@click.option("--format", "file_format", default="parquet", help="The format of the outputs' files.")
@click.option("--samples", type=click.IntRange(min=0), default=5, help="Show so many of the answers that differ.")
def compare(output_a: str, output_b: str, file_format: str, samples: int) -> None:
    """Compare the answers of two runs over the same rows; the last line printed is a page with the same."""
    from phibatch.job.console import Reporter
    from phibatch.job.publish import find_output, publish_comparison, read_comparison

    spark = _open_session("phibatch compare")
    first, second = (find_output(spark, output, file_format) for output in (output_a, output_b))
    comparison = read_comparison(spark, first, second, samples)
    Reporter(Console()).say_comparison(comparison)
    click.echo(publish_comparison(spark, comparison, second))


def _read_config(options: dict[str, Any]) -> JobConfig:
    overrides = dict(_split(setting) for setting in options["settings"])
    named = {"input.path": "input_path", "output.path": "output_path", "model.uri": "model_uri"}
    values = {key: options[name] for key, name in named.items() if options[name] is not None}
    return read_config(options["config_file"], overrides, values)


def _open_session(name: str) -> Any:
    # Imported when asked for: `phibatch --help` needs neither Spark nor MLflow.
    from phibatch.job.session import open_session
    from phibatch.model.registry import use_default_tracking

    use_default_tracking()
    return open_session(name)


def _split(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting} has no value: write --set section.key=value")
    return key.strip(), value


def start() -> None:
    """What the wheel's `phibatch` starts. Success is a return: Databricks takes any SystemExit for a failure."""
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    start()

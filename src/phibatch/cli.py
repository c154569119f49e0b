"""`phibatch ...`: the command line. No logic; every command is one call into the package."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import phibatch
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
]


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
    # Imported when asked for: `phibatch --help` needs neither Spark nor MLflow.
    from phibatch.model import registry

    defaults = _defaults(options)
    registry.check_names(name, alias)
    folder = _folder(options)
    registry.use_default_tracking()
    click.echo(registry.log_onnx(folder, name, alias, defaults).uri)


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
    click.echo(registry.log_transformers(folder, name, alias, defaults, dtype).uri)


def _defaults(options: dict[str, Any]) -> GenerationParams:
    given = {name: options[name] for name in ("max_tokens", "temperature") if options[name] is not None}
    try:
        return GenerationParams(**given)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _folder(options: dict[str, Any], files: tuple[str, ...] | None = None) -> Path:
    from phibatch.model import hub

    if (options["model_dir"] is None) == (options["hf_repo"] is None):
        raise ConfigError("exactly one of --model-dir and --hf-repo must be given")
    model_dir: Path | None = options["model_dir"]
    return model_dir or hub.download_folder(options["hf_repo"], options["subfolder"], options["revision"], files)


@main.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="The job's YAML file.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable.")
@click.option("--input", "input_path", help="Override input.path.")
@click.option("--output", "output_path", help="Override output.path.")
@click.option("--model", "model_uri", help="Override model.uri.")
@click.option("--show", type=click.IntRange(min=0), default=0, help="Print this many answers at the end.")
def run(
    config_file: Path | None,
    settings: tuple[str, ...],
    input_path: str | None,
    output_path: str | None,
    model_uri: str | None,
    show: int,
) -> None:
    """Answer every row of a table."""
    from phibatch.config import read_config

    overrides = dict(_split(setting) for setting in settings)
    named = {"input.path": input_path, "output.path": output_path, "model.uri": model_uri}
    config = read_config(config_file, overrides, {key: value for key, value in named.items() if value is not None})

    from phibatch.job.output import read_responses
    from phibatch.job.pipeline import run_batch
    from phibatch.job.progress import Reporter
    from phibatch.job.session import open_session
    from phibatch.model.registry import use_default_tracking

    use_default_tracking()
    spark = open_session(config.job.name)
    reporter = Reporter(Console(stderr=False))
    run_batch(spark, config, reporter)
    reporter.show_answers(read_responses(spark, config.output), show)


def _split(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting} has no value: write --set section.key=value")
    return key.strip(), value


if __name__ == "__main__":
    sys.exit(main())

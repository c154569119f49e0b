"""The written table, added up; and what of a run goes to MLflow."""

import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import mlflow
from mlflow.data.spark_dataset import from_spark
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

import phibatch
from phibatch.config import InputConfig, JobConfig
from phibatch.contract import ENGINE_COLUMNS, USAGE_COLUMNS, name_answerer
from phibatch.job.stage import PlanCounts
from phibatch.job.work import RunRecord
from phibatch.model.registry import ResolvedModel

PACKAGES = ("phibatch", "pyspark", "mlflow", "onnxruntime", "onnxruntime-genai", "transformers", "torch", "tokenizers")
"""Those whose versions are noted with a run."""

TOKENS = [f"{kind}_tokens" for kind in ("prompt", "completion", "cached")]


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """One run's totals, over the rows of the response table that it wrote.

    `seconds` is wall time from the run's start to the written table; `tokens_per_second` is `completion_tokens` by it.
    A row answered with another's generation (`duplicates`) has that generation's usage, as it would have alone.
    `skipped` are rows that were there already; `table_rows` and `table_failed` count the whole table.
    `engine` and `engine_version` are what answered: None where nothing was generated, or it is not known.
    """

    run_id: str
    model: str
    started: datetime
    seconds: float
    rows: int
    succeeded: int
    failed_by_code: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    duplicates: int = 0
    skipped: int = 0
    table_rows: int = 0
    table_failed: int = 0
    engine: str | None = None
    engine_version: str | None = None

    @property
    def failed(self) -> int:
        return self.rows - self.succeeded

    @property
    def error_rate(self) -> float:
        """Of the whole table: what a run that died has left counts as well."""
        return self.table_failed / self.table_rows if self.table_rows else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    def as_usage(self) -> dict[str, object]:
        """The run's line of the usage table."""
        return {name: getattr(self, name) for name in USAGE_COLUMNS}

    def as_metrics(self) -> dict[str, float]:
        """The run's MLflow metrics."""
        names = [name for name, kind in USAGE_COLUMNS.items() if kind in {"bigint", "double"}]
        more = ("duplicates", "skipped", "table_rows", "table_failed")
        totals = {name: getattr(self, name) for name in (*names, *more)}
        return {**totals, **{f"failed_{code}": count for code, count in self.failed_by_code.items()}}


def summarise(
    responses: DataFrame,
    runs: Sequence[RunRecord],
    seconds: float,
    counts: PlanCounts,
    engines: Sequence[tuple[str, str]],
) -> list[BatchSummary]:
    """Add up a written response table by run, in one pass.

    Args:
        responses: the table.
        runs: those to account for, the present one last. One that died before lasted until its last row.
        seconds: of the present one.
        counts: of its plan.
        engines: that answered in it, each with its version.
    """
    groups = (
        responses.groupBy("run_id", F.col("error.code").alias("code"))
        .agg(
            F.count("*").alias("rows"),
            F.max("created").cast("double").alias("last"),
            *(F.sum(f"usage.{name}").alias(name) for name in TOKENS),
        )
        .collect()
    )
    summaries = []
    for run in runs:
        own = [group for group in groups if group["run_id"] == run.run_id]
        by_code = {group["code"]: group["rows"] for group in own}
        started = datetime.fromisoformat(run.started)
        present = run is runs[-1]
        last = max((group["last"] for group in own), default=started.timestamp())
        tokens: dict[str, Any] = {name: sum(group[name] or 0 for group in own) for name in TOKENS}
        summary = BatchSummary(
            run_id=run.run_id,
            model=run.model,
            started=started,
            seconds=seconds if present else max(0.0, last - started.timestamp()),
            rows=sum(by_code.values()),
            succeeded=by_code.pop(None, 0),
            failed_by_code=by_code,
            **tokens,
        )
        summaries.append(summary)
    table_rows = sum(group["rows"] for group in groups)
    table_failed = sum(group["rows"] for group in groups if group["code"] is not None)
    engine, engine_version = (", ".join(dict.fromkeys(pair[place] for pair in engines)) or None for place in (0, 1))
    summaries[-1] = replace(
        summaries[-1],
        duplicates=counts.duplicates,
        skipped=counts.skipped,
        table_rows=table_rows,
        table_failed=table_failed,
        engine=engine,
        engine_version=engine_version,
    )
    return summaries


def close_runs(runs: Sequence[RunRecord]) -> None:
    """Have MLflow show runs that died, without a word to it, as killed."""
    client = mlflow.MlflowClient()
    for run in runs:
        # It may have been tracked elsewhere, or be deleted: this run is done all the same.
        with suppress(MlflowException):
            if client.get_run(run.run_id).info.status == "RUNNING":
                client.set_terminated(run.run_id, "KILLED")


@contextmanager
def track_run(
    config: JobConfig, model: ResolvedModel, prompts: DataFrame, prompt_version: str | None = None
) -> Iterator[str]:
    """An MLflow run with the resolved configuration, the input, the model and registered prompts; gives its id.

    It ends as FAILED when the block raises.
    """
    with mlflow.start_run(run_name=config.job.name) as run:
        resolved = config.model_dump(mode="json")
        resolved["model"]["uri"] = model.uri
        mlflow.log_dict(resolved, "config.yaml")
        mlflow.log_dict(_versions(), "versions.yaml")
        mlflow.log_params(_flatten(resolved))
        mlflow.set_tags(
            {
                "phibatch.version": phibatch.__version__,
                "phibatch.model": name_answerer(model.uri, config.model.engine),
                "phibatch.model_digest": model.digest,
                **({"phibatch.prompt_version": prompt_version} if prompt_version else {}),
            }
        )
        with warnings.catch_warnings():
            # A hint for those who train on the table's whole numbers.
            warnings.filterwarnings("ignore", message=".*Inferred schema contains integer column")
            mlflow.log_input(_dataset(prompts, config.input), context="inference")
        yield run.info.run_id


def log_progress(run_id: str, metrics: dict[str, float], step: int) -> None:
    """Log numbers of a run that goes on, from any thread. They are no accounts: a server that is away loses them."""
    now = round(time.time() * 1000)
    with suppress(MlflowException):
        mlflow.MlflowClient().log_batch(run_id, [Metric(name, value, now, step) for name, value in metrics.items()])


def log_summary(summary: BatchSummary) -> None:
    """Log a run's totals as metrics of the active run, and what answered as tags."""
    mlflow.log_metrics(summary.as_metrics())
    told = {f"phibatch.{name}": getattr(summary, name) for name in ENGINE_COLUMNS}
    mlflow.set_tags({tag: value for tag, value in told.items() if value is not None})
    mlflow.log_dict({**asdict(summary), "started": summary.started.isoformat()}, "summary.json")


def _versions() -> dict[str, str]:
    """What the driver runs on; executors that run on something else fail, or are the user's own choice."""
    here = [name for name in PACKAGES if find_spec(name.replace("-", "_"))]
    return {"python": platform.python_version(), **{name: version(name) for name in here}}


def _dataset(prompts: DataFrame, config: InputConfig) -> Any:
    if config.table:
        return from_spark(prompts, table_name=config.table)
    return from_spark(prompts, path=config.path)


def _flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        flat.update(_flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat

"""The written table, added up; and what of a run goes to MLflow."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import mlflow
from mlflow.data.spark_dataset import from_spark
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

import phibatch
from phibatch.config import InputConfig, JobConfig
from phibatch.contract import USAGE_COLUMNS
from phibatch.job.plan import PlanCounts
from phibatch.model.registry import ResolvedModel


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """One run's totals, over the response table's rows.

    `seconds` is wall time from the run's start to the written table; `tokens_per_second` is `completion_tokens` by it.
    A row answered with another's generation (`duplicates`) has that generation's usage, as it would have alone.
    """

    run_id: str
    model: str
    started: datetime
    seconds: float
    rows: int
    succeeded: int
    failed_by_code: dict[str, int]
    duplicates: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def failed(self) -> int:
        return self.rows - self.succeeded

    @property
    def error_rate(self) -> float:
        return self.failed / self.rows if self.rows else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    def as_usage(self) -> dict[str, object]:
        """The run's line of the usage table."""
        return {name: getattr(self, name) for name in USAGE_COLUMNS}

    def as_metrics(self) -> dict[str, float]:
        """The run's MLflow metrics."""
        names = [name for name, kind in USAGE_COLUMNS.items() if kind in {"bigint", "double"}]
        totals = {name: getattr(self, name) for name in (*names, "duplicates")}
        return {**totals, **{f"failed_{code}": count for code, count in self.failed_by_code.items()}}


def summarise(
    responses: DataFrame, model: ResolvedModel, run_id: str, started: datetime, seconds: float, counts: PlanCounts
) -> BatchSummary:
    """Add up a written response table, in one pass."""
    tokens = [f"{kind}_tokens" for kind in ("prompt", "completion", "cached")]
    groups = (
        responses.groupBy(F.col("error.code").alias("code"))
        .agg(F.count("*").alias("rows"), *(F.sum(f"usage.{name}").alias(name) for name in tokens))
        .collect()
    )
    by_code = {group["code"]: group["rows"] for group in groups}
    return BatchSummary(
        run_id=run_id,
        model=model.uri,
        started=started,
        seconds=seconds,
        rows=sum(by_code.values()),
        succeeded=by_code.pop(None, 0),
        failed_by_code=by_code,
        duplicates=counts.duplicates,
        **{name: sum(group[name] or 0 for group in groups) for name in tokens},
    )


@contextmanager
def track_run(config: JobConfig, model: ResolvedModel, prompts: DataFrame) -> Iterator[str]:
    """An MLflow run with the resolved configuration, the input and the model; gives its id.

    It ends as FAILED when the block raises.
    """
    with mlflow.start_run(run_name=config.job.name) as run:
        resolved = config.model_dump(mode="json")
        resolved["model"]["uri"] = model.uri
        # A reader's options may hold passwords.
        resolved["input"]["options"] = dict.fromkeys(resolved["input"]["options"], "***")
        mlflow.log_dict(resolved, "config.yaml")
        mlflow.log_params(_flatten(resolved))
        mlflow.set_tags(
            {
                "phibatch.version": phibatch.__version__,
                "phibatch.model": model.uri,
                "phibatch.model_digest": model.digest,
            }
        )
        with warnings.catch_warnings():
            # A hint for those who train on the table's whole numbers.
            warnings.filterwarnings("ignore", message=".*Inferred schema contains integer column")
            mlflow.log_input(_dataset(prompts, config.input), context="inference")
        yield run.info.run_id


def log_summary(summary: BatchSummary) -> None:
    """Log a run's totals as metrics of the active run."""
    mlflow.log_metrics(summary.as_metrics())
    mlflow.log_dict({**asdict(summary), "started": summary.started.isoformat()}, "summary.json")


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

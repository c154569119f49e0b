import pytest

from phibatch.job.output import read_responses
from phibatch.job.pipeline import run_batch


@pytest.fixture
def run(spark, job, write_parquet, calls):
    """Run the counting model over rows of `custom_id` and `prompt`; gives its summary, the table and what was asked."""

    def go(prompts, name="input", **sections):
        rows = prompts if isinstance(prompts, list) else [{"custom_id": k, "prompt": v} for k, v in prompts.items()]
        config = job(write_parquet(rows, name), **{"model": {"uri": "models:/counting/1"}, **sections})
        summary = run_batch(spark, config)
        table = sorted(read_responses(spark, config.output).collect(), key=lambda row: (row["custom_id"], str(row)))
        return summary, table, sorted(calls())

    return go

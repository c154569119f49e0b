"""Static batches, for the engines whose library generates a batch as a whole."""

from collections.abc import Callable, Iterator, Sequence

from phibatch.contract import Completion, Request
from phibatch.errors import RowError
from phibatch.model.engine.row import Row

MAX_BATCH_TOKENS = 8192
"""Rows times padded length of one batch: what it may hold of KV, which for Phi-3-mini in fp32 is 768 KiB a token, so
6 GiB at the most. Two rows of its 4k context just fit, and two are the smallest batch of onnxruntime-genai."""


def generate_batches(
    requests: Sequence[Request],
    build_row: Callable[[Request], Row],
    run: Callable[[list[Row]], None],
    batch_size: int,
    context_length: int,
) -> list[Completion]:
    """One completion per request, in order.

    Args:
        requests: what is asked for.
        build_row: a request as a row of the engine. Raises RowError, which fails that row alone.
        run: generates a batch to its end.
        batch_size: the most rows in a batch.
        context_length: prompt and completion together, in tokens.
    """
    outcomes: dict[int, Completion] = {}
    rows: dict[int, Row] = {}
    for place, request in enumerate(requests):
        try:
            rows[place] = build_row(request)
        except RowError as error:
            outcomes[place] = Completion.failed(error.code, str(error))
    for batch in plan_batches(list(rows.values()), batch_size, context_length):
        run(batch)
    outcomes.update({place: row.completion() for place, row in rows.items()})
    return [outcomes[place] for place in range(len(requests))]


def plan_batches(rows: list[Row], batch_size: int, context_length: int) -> Iterator[list[Row]]:
    """Cut rows into batches that can share a generator and waste little.

    Rows of like length meet. All rows of a batch are padded to the longest prompt and run until the longest limit, and
    the two together must stay within the context and within `MAX_BATCH_TOKENS`.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (-len(row.prompt), -row.limit)):
        # The longest prompt comes first, so it sets the width.
        width = len((batch or [row])[0].prompt)
        length = width + max(member.limit for member in (*batch, row))
        fits = length <= context_length and length * (len(batch) + 1) <= MAX_BATCH_TOKENS and len(batch) < batch_size
        if batch and not fits:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch

"""Static batches, for the engines whose library generates a batch as a whole."""

from collections.abc import Iterator

from phibatch.model.engine.row import Row

MAX_BATCH_TOKENS = 8192
"""Rows times padded length of one batch: what it may hold of KV, which for Phi-3-mini in fp32 is 768 KiB a token, so
6 GiB at the most. Two rows of its 4k context just fit, and two are the smallest batch of onnxruntime-genai."""


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

import random
from itertools import pairwise
from types import SimpleNamespace

from phibatch.model.engine.batches import MAX_BATCH_TOKENS, plan_batches


def test_batches_fit_the_context_and_the_memory():
    """Whatever rows meet, padded length and limit stay within the context and the token budget, and none is lost."""
    rng = random.Random(1)
    context = 4096
    rows = []
    for _ in range(300):
        prompt = [0] * rng.randint(1, 4000)
        rows.append(SimpleNamespace(prompt=prompt, limit=rng.randint(1, context - len(prompt))))
    batches = list(plan_batches(rows, 8, context))
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
    for batch in batches:
        length = max(len(row.prompt) for row in batch) + max(row.limit for row in batch)
        assert len(batch) <= 8
        assert length <= context
        assert len(batch) == 1 or length * len(batch) <= MAX_BATCH_TOKENS
    widths = [max(len(row.prompt) for row in batch) for batch in batches]
    assert all(left >= right for left, right in pairwise(widths))

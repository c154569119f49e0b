"""Choosing the next token of one row from its logits."""

import numpy as np
from numpy.typing import NDArray

from phibatch.contract import GenerationParams

Logits = NDArray[np.float32]
Weights = NDArray[np.float64]
Ids = NDArray[np.int64]

HEAD = 1024
"""How many of the likeliest tokens are looked at first for top-p: they hold nearly all of the mass, as a rule."""


class Sampler:
    """One row's choices: greedy at temperature 0, else drawn from the row's own random stream.

    The stream is Philox keyed by the row's seed, one number a token, so that a choice depends on nothing but the row.
    A row without a seed has the stream of seed 0.

    Args:
        params: the row's parameters.
        prompt: the prompt's token ids, which the repetition penalty counts as seen.
    """

    def __init__(self, params: GenerationParams, prompt: list[int]) -> None:
        self._params = params
        self._random = np.random.Generator(np.random.Philox(key=(params.seed or 0) % 2**64))
        self._seen = set(prompt)

    def choose(self, logits: Logits) -> int:
        """The next token id.

        Order as in Hugging Face's `generate`: repetition penalty (Keskar et al. 2019, section 4.1), temperature, top-k,
        top-p (Holtzman et al. 2020: the smallest set of likeliest tokens that reaches the mass), min-p (Nguyen et al.
        2024: those of at least this share of the likeliest one's probability). Ties go to the lower token id.

        Args:
            logits: shape [vocabulary].
        """
        params = self._params
        if params.repetition_penalty != 1:
            seen = np.fromiter(self._seen, dtype=np.int64)
            logits = logits.copy()
            penalty = np.float32(params.repetition_penalty)
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        token = int(logits.argmax()) if params.greedy else self._draw(logits)
        self._seen.add(token)
        return token

    def _draw(self, logits: Logits) -> int:
        params = self._params
        # The likeliest weighs one, so that no temperature, however low, overflows.
        with np.errstate(over="ignore", under="ignore"):
            weights = np.exp((logits.astype(np.float64) - logits.max()) / params.temperature)
        kept = np.arange(len(weights))
        if 0 < params.top_k < len(weights):
            kept = _heaviest(weights, kept, params.top_k)
        if params.top_p < 1:
            kept = _heaviest(weights, kept, _nucleus_size(weights[kept], params.top_p))
        if params.min_p:
            kept = kept[weights[kept] >= params.min_p]
        mass = np.cumsum(weights[kept])
        place = np.searchsorted(mass, self._random.random() * mass[-1], side="right")
        return int(kept[min(int(place), len(kept) - 1)])


def _heaviest(weights: Weights, kept: Ids, count: int) -> Ids:
    """Of some tokens, in the order of their ids, the heaviest `count`; of those that weigh the same the first."""
    mine = weights[kept]
    bound = np.partition(mine, -count)[-count]
    chosen = mine > bound
    chosen[np.flatnonzero(mine == bound)[: count - np.count_nonzero(chosen)]] = True
    found: Ids = kept[chosen]
    return found


def _nucleus_size(weights: Weights, top_p: float) -> int:
    """How many of the heaviest it takes to reach a share of the whole mass."""
    wanted = top_p * weights.sum()
    for count in (min(HEAD, len(weights)), len(weights)):
        masses = np.cumsum(np.sort(np.partition(weights, -count)[-count:])[::-1])
        if masses[-1] >= wanted:
            return int(np.searchsorted(masses, wanted)) + 1
    return len(weights)

"""Choosing the next token of one row from its logits."""

import numpy as np
from numpy.typing import NDArray

from phibatch.contract import GenerationParams

Logits = NDArray[np.float32]
Weights = NDArray[np.float64]
Ids = NDArray[np.int64]

NUCLEUS = 128
"""How many of the likeliest tokens are looked at first for top-p."""


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
            kept = _heaviest(weights, params.top_k)[: params.top_k]
        if params.top_p < 1:
            kept = _nucleus(weights, kept, params.top_p)
        if params.min_p:
            kept = kept[weights[kept] >= params.min_p]
        # In the order of their ids, whichever way they were found.
        kept = np.sort(kept)
        mass = np.cumsum(weights[kept])
        place = np.searchsorted(mass, self._random.random() * mass[-1], side="right")
        return int(kept[min(int(place), len(kept) - 1)])


def _heaviest(weights: Weights, count: int) -> Ids:
    """The ids of the heaviest `count` tokens, the heaviest first, with all that weigh as much as the last of them."""
    bound = np.partition(weights, -count)[-count]
    ids = np.flatnonzero(weights >= bound)
    # The stable sort settles ties by id.
    return ids[np.argsort(-weights[ids], kind="stable")]


def _nucleus(weights: Weights, kept: Ids, top_p: float) -> Ids:
    """Of some tokens the fewest, heaviest first, that reach a share of their mass."""
    mine = weights[kept]
    wanted = top_p * mine.sum()
    # Few tokens hold nearly all of the mass, as a rule: to sort a whole vocabulary would cost more than all the rest.
    count = min(NUCLEUS, len(mine))
    while True:
        order = _heaviest(mine, count)
        mass = np.cumsum(mine[order])
        if mass[-1] >= wanted or len(order) == len(mine):
            return kept[order[: int(np.searchsorted(mass, wanted)) + 1]]
        count = min(count * 8, len(mine))

"""Choosing the next token of one row from its logits."""

import numpy as np
from numpy.typing import NDArray

from phibatch.contract import GenerationParams

Logits = NDArray[np.float32]


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
        top-p (Holtzman et al. 2020: the smallest set of likeliest tokens that reaches the mass).

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
        # Likeliest first; the stable sort settles ties by token id.
        order = np.argsort(-logits, kind="stable")
        if params.top_k:
            order = order[: params.top_k]
        ordered = logits[order].astype(np.float64)
        # The likeliest is subtracted first, so that no temperature, however low, overflows.
        with np.errstate(over="ignore"):
            mass = np.cumsum(np.exp((ordered - ordered[0]) / params.temperature))
        if params.top_p < 1:
            mass = mass[: int(np.searchsorted(mass, params.top_p * mass[-1])) + 1]
        place = np.searchsorted(mass, self._random.random() * mass[-1], side="right")
        return int(order[min(int(place), len(mass) - 1)])

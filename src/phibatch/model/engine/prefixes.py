"""Prefixes that prompts share, with their keys and values: found by comparing tokens, computed once."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from phibatch.model.engine.kv import Array, KVShape

MIN_LENGTH = 16
"""Shorter prefixes cost more to keep than to compute."""

Tokens = NDArray[np.int64]


class PrefixStore:
    """The prefixes used last, within a bound of memory.

    Args:
        shape: of a token's keys and values.
        memory: the bound, in bytes.
    """

    def __init__(self, shape: KVShape, memory: int) -> None:
        self._room = memory // shape.token_bytes
        self._entries: OrderedDict[bytes, tuple[Tokens, list[Array]]] = OrderedDict()

    def find(self, prompt: Tokens) -> tuple[int, list[Array]]:
        """The longest stretch of a prompt's beginning that is known, and what holds it: (0, []) where none is."""
        best, key = 0, b""
        for each, (tokens, _) in self._entries.items():
            length = common_length(tokens, prompt)
            if length > best:
                best, key = length, each
        if best < MIN_LENGTH:
            return 0, []
        self._entries.move_to_end(key)
        return best, self._entries[key][1]

    def room(self, length: int) -> int:
        """How many of `length` tokens may be kept."""
        return min(length, self._room)

    def keep(self, tokens: Tokens, parts: list[Array]) -> None:
        """Keep a prefix; those used longest ago make room for it."""
        if len(tokens) < MIN_LENGTH:
            return
        self._entries[tokens.tobytes()] = (tokens.copy(), parts)
        while sum(len(each) for each, _ in self._entries.values()) > self._room:
            self._entries.popitem(last=False)


def common_length(left: Tokens, right: Tokens) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(left), len(right))
    differing = np.flatnonzero(left[:size] != right[:size])
    return int(differing[0]) if len(differing) else size


def shared_lengths(prompts: Sequence[Tokens]) -> list[int]:
    """Of prompts in order of their tokens: how many tokens each shares with the one after it.

    Sorted so, no later prompt shares more of a prompt's beginning than the next one does.
    """
    return [common_length(left, right) for left, right in pairwise(prompts)] + [0] * bool(prompts)

"""Keys and values of the tokens that are being worked on: memory of our own, in slots of one size."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class KVShape:
    """The keys and values of one token.

    Attributes:
        layers: how many layers have them.
        heads: key and value heads of a layer.
        head_size: numbers of a head, in float32.
    """

    layers: int
    heads: int
    head_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, in all layers."""
        return self.layers * 2 * self.heads * self.head_size * 4


class KVSlots:
    """Slots for rows that are generated together.

    Args:
        shape: of a token.
        slots: how many rows, at least two.
        capacity: tokens of one row, prompt and completion together.

    Attributes:
        arrays: `0.key`, `0.value`, ...: shape [slots, heads, capacity, head_size]. The system gives their memory when
            it is first written.
    """

    def __init__(self, shape: KVShape, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        size = (slots, shape.heads, capacity, shape.head_size)
        names = (f"{layer}.{part}" for layer in range(shape.layers) for part in ("key", "value"))
        self.arrays: dict[str, Array] = {name: np.zeros(size, dtype=np.float32) for name in names}

    def read(self, slot: int, length: int) -> list[Array]:
        """A copy of a slot's first tokens: arrays of shape [heads, length, head_size]."""
        return [array[slot, :, :length].copy() for array in self.arrays.values()]

    def write(self, slot: int, parts: list[Array], length: int) -> None:
        """Put the first tokens of such a copy into a slot."""
        for array, part in zip(self.arrays.values(), parts, strict=True):
            array[slot, :, :length] = part[:, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot's first tokens to another slot."""
        for array in self.arrays.values():
            array[target, :, :length] = array[source, :, :length]

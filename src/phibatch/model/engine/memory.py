"""How much memory an engine may take, and how many rows of which length that holds."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where the kernel says what a container may take: version 2 and version 1 of control groups."""

SHARE = 0.5
"""Of the memory that belongs to a task's cores: the rest is the JVM's, Python's and the page cache's."""

PREFIX_SHARE = 0.125
"""Of the memory for keys and values: what is kept of shared prefixes."""

SPREAD = 8
"""How many times longer than the shortest row of a pool its slots may be, where memory is ample. Short rows in long
slots touch much more memory than they fill, since the system gives it in large pages; and every pool more is a tail in
which slots stand empty."""


def default_memory(threads: int) -> int:
    """Bytes that an engine of so many threads may take: its share of the container, or of the machine, by cores."""
    limits = [int(text) for file in CGROUP_LIMITS if file.is_file() and (text := file.read_text().strip()).isdigit()]
    total = min([psutil.virtual_memory().total, *limits])
    cores = len(os.sched_getaffinity(0))
    return int(total * SHARE * min(1, threads / cores))


@dataclass(frozen=True, slots=True)
class Pool:
    """Rows that are generated together: `slots` of `capacity` tokens."""

    slots: int
    capacity: int


def plan_pools(needs: Sequence[int], max_slots: int, tokens: int) -> list[tuple[Pool, list[int]]]:
    """Share slots out to rows.

    Rows have slots of the longest one's size, but those much shorter, by `SPREAD`, are planned by themselves. Where
    `max_slots` of the longest do not fit, those that need at most half of it are, so that a long row does not take the
    slots of many short ones.

    Args:
        needs: of each row, prompt and limit together, in tokens.
        max_slots: the most rows at once.
        tokens: how many tokens' keys and values the memory holds.

    Returns:
        Pools, the largest capacity first, each with the rows (their places in `needs`) it is for. A pool has two slots
        at the least, the second of which may be idle; it may then need more than `tokens`.
    """
    places = sorted(range(len(needs)), key=lambda place: -needs[place])
    pools = []
    while places:
        capacity = needs[places[0]]
        slots = min(max_slots, tokens // capacity)
        spread = 2 if slots < max_slots else SPREAD
        count = next((at for at, place in enumerate(places) if needs[place] <= capacity // spread), len(places))
        pools.append((Pool(max(2, min(slots, count)), capacity), places[:count]))
        places = places[count:]
    return pools

"""The engine on raw onnxruntime: rows in slots, replaced one by one as they end, with shared prefixes computed once."""

import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from phibatch.contract import Completion, EngineName, ErrorCode, Request
from phibatch.errors import EngineError, RowError
from phibatch.model.engine import watchdog
from phibatch.model.engine.base import EngineOptions
from phibatch.model.engine.genai import open_tokenizer
from phibatch.model.engine.graph import DecoderGraph
from phibatch.model.engine.kv import KVSlots
from phibatch.model.engine.memory import PREFIX_SHARE, Pool, default_memory, plan_pools
from phibatch.model.engine.prefixes import PrefixStore, Tokens, shared_lengths
from phibatch.model.engine.row import Row, choose_tokens, generate_rows
from phibatch.model.folder import TOKENIZER, ModelFolder
from phibatch.model.grammar import Grammars

CHUNK = 256
"""Tokens of a prompt that are fed at once: enough for full speed, and a bound on what a long prompt takes."""

MIB = 2**20

logger = logging.getLogger(__name__)

Pending = tuple[Row, Tokens, int]
"""A row, its prompt's tokens, and how many of them the row after it shares."""


class SlotsEngine:
    """Generates with continuous batching on the CPU.

    A prompt is fed alone into a free slot; a step then feeds one token to every row. A row's answer is the same to the
    bit whatever is beside it: the kernels compute a row alike in any number of rows from two up, so nothing but a whole
    prompt of one token is ever fed as a single token, and a row alone has an idle one beside it.
    """

    name = EngineName.SLOTS.value
    version = f"onnxruntime {onnxruntime.__version__}"

    def __init__(self, model_dir: Path, options: EngineOptions) -> None:
        self._folder = ModelFolder.open(model_dir)
        self._graph = DecoderGraph(self._folder, options.threads)
        self._tokenizer = open_tokenizer(model_dir)
        self._grammars = Grammars(model_dir / TOKENIZER, self._folder.eos_token_ids)
        self._max_slots = max(2, options.batch_size)
        self._row_timeout = options.row_timeout
        weights = sum(file.stat().st_size for file in model_dir.iterdir() if file.is_file())
        budget = options.memory or default_memory(options.threads)
        memory = budget - weights
        if memory <= 0:
            raise EngineError(
                f"the weights alone take {weights / MIB:,.0f} MiB, more than the {budget / MIB:,.0f} MiB of the engine:"
                " set model.memory, or give the task more of the machine's cores"
            )
        self._prefixes = PrefixStore(self._graph.kv, int(memory * PREFIX_SHARE))
        self._tokens = int(memory * (1 - PREFIX_SHARE)) // self._graph.kv.token_bytes
        logger.info(
            "slots engine: %d threads, memory %.0f MiB: weights %.0f, shared prefixes up to %.0f, rows up to %.0f",
            *(options.threads, budget / MIB, weights / MIB, memory * PREFIX_SHARE / MIB),
            memory * (1 - PREFIX_SHARE) / MIB,
        )

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return generate_rows(requests, self._build_row, self._run)

    def count(self, requests: Sequence[Request]) -> list[Completion]:
        return generate_rows(requests, self._build_row, None)

    def _build_row(self, request: Request) -> Row:
        folder = self._folder
        row = Row(
            request, self._tokenizer, folder.context_length, folder.eos_token_ids, self._grammars, self._row_timeout
        )
        if self._graph.reach:
            self._graph.reach.check(row)
        need = len(row.prompt) + row.limit
        if 2 * need > self._tokens:
            raise RowError(
                ErrorCode.INSUFFICIENT_MEMORY,
                f"prompt and max_tokens need room for {need} tokens, and model.memory holds {self._tokens // 2}",
            )
        return row

    def _run(self, rows: list[Row]) -> None:
        needs = [len(row.prompt) + row.limit for row in rows]
        for pool, places in plan_pools(needs, self._max_slots, self._tokens):
            self._run_pool(pool, [rows[place] for place in places])

    def _run_pool(self, pool: Pool, rows: list[Row]) -> None:
        size = pool.slots * pool.capacity * self._graph.kv.token_bytes
        logger.info("%d rows in %d slots of %d tokens: %.0f MiB", len(rows), pool.slots, pool.capacity, size / MIB)
        slots = KVSlots(self._graph.kv, pool.slots, pool.capacity)
        # In the order of their tokens, so that equal prefixes meet.
        ordered = sorted(rows, key=lambda row: row.prompt)
        prompts = [np.asarray(row.prompt, dtype=np.int64) for row in ordered]
        pending = deque(zip(ordered, prompts, shared_lengths(prompts), strict=True))
        active: list[Row | None] = []
        self._fill(slots, active, pending)
        while active:
            self._step(slots, [row for row in active if row is not None])
            active = [None if row is None or row.done else row for row in active]
            self._fill(slots, active, pending)

    def _fill(self, slots: KVSlots, active: list[Row | None], pending: deque[Pending]) -> None:
        """Put a pending row into every free slot; when there is none left, close the gaps with rows from the end."""
        slot = 0
        while slot < len(active) or (pending and slot < slots.slots):
            if slot == len(active):
                active.append(None)
            while pending and active[slot] is None:
                row, prompt, shared = pending.popleft()
                self._admit(slots, slot, row, prompt, shared)
                active[slot] = None if row.done else row
            if active[slot] is not None:
                slot += 1
                continue
            last = active.pop()
            if last is not None and slot < len(active):
                slots.move(len(active), slot, last.length)
                active[slot] = last

    def _admit(self, slots: KVSlots, slot: int, row: Row, prompt: Tokens, shared: int) -> None:
        row.admit()
        known, parts = self._prefixes.find(prompt)
        # Two tokens at the least are left to compute: a single one would round differently.
        done = max(0, min(known, len(prompt) - 2))
        if done:
            slots.write(slot, parts, done)
        row.cached_tokens = done
        while done < len(prompt):
            left = len(prompt) - done
            # No single token may be left over for the end.
            size = left if left <= CHUNK + 1 else CHUNK
            logits = self._graph.run(slots, slot, prompt[None, done : done + size], [done])
            done += size
            watchdog.step()
        keep = self._prefixes.room(shared)
        if keep > known:
            self._prefixes.keep(prompt[:keep], slots.read(slot, keep))
        row.length = len(prompt)
        choose_tokens([row], logits)

    def _step(self, slots: KVSlots, active: list[Row]) -> None:
        ids = [row.last_token for row in active]
        lengths = [row.length for row in active]
        if len(active) == 1:
            # An idle row, in a slot that nobody has.
            ids, lengths = [*ids, 0], [*lengths, 0]
        logits = self._graph.run(slots, 0, np.asarray(ids, dtype=np.int64)[:, None], lengths)
        for row in active:
            row.length += 1
        choose_tokens(active, logits)

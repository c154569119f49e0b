"""Tiny models built as a user would build them, and what transformers itself computes with them."""

import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from architectures import Architecture, build_checkpoint
from tokenizers import Tokenizer
from weights import read_int4_weights

from phibatch import demo
from phibatch.contract import Completion

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TOKENS = {"bos_token_id": 1, "eos_token_id": 900, "pad_token_id": 900}
NEW_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """What an engine did with a row: the tokens that it chose, and the logits of each, shape [tokens, vocabulary]."""

    prompt: list[int]
    tokens: list[int]
    logits: Any
    completion: Completion


class Built:
    """A tiny model of an architecture, as a checkpoint and as the builder's folders."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.architecture = architecture
        self._folder = folder
        self.checkpoint = folder / "checkpoint"
        vocabulary = Tokenizer.from_file(str(demo.TWIN_DIR / "tokenizer.json")).get_vocab_size()
        self.reference = build_checkpoint(architecture, vocabulary, self.checkpoint, **TOKENS)
        for name in TOKENIZER_FILES:
            shutil.copyfile(demo.TWIN_DIR / name, self.checkpoint / name)
        self._failures: dict[str, str | None] = {}

    def build(self, precision: str) -> str | None:
        """Have the builder make the folder of a precision; gives its last line where it fails."""
        if precision not in self._failures:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(self.checkpoint)]
            command += ["-o", str(self.folder(precision)), "-p", precision, "-e", "cpu"]
            # No hub is asked. All else is the builder's default.
            command += ["-c", str(self._folder / "cache"), "--extra_options", "hf_token=false"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            self._failures[precision] = done.stderr.strip().splitlines()[-1] if done.returncode else None
        return self._failures[precision]

    def folder(self, precision: str) -> Path:
        return self._folder / precision

    @cached_property
    def int4_reference(self) -> Any:
        """The checkpoint with the weights that the int4 folder has, in float32."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        read_int4_weights(self.folder("int4"), model)
        return model


def build_prompt(words: list[tuple[str, int]], length: int) -> tuple[str, list[int]]:
    """A text of so many tokens, and their ids."""
    draw = random.Random(length)
    chosen = [draw.choice(words) for _ in range(length)]
    return "".join(text for text, _ in chosen), [number for _, number in chosen]


def reference_logits(model: Any, answer: Answer) -> Any:
    """transformers' logits at each place where the engine chose a token, shape [tokens, vocabulary].

    Of one answer they are computed once: engines that agree share them.
    """
    fed = (*answer.prompt, *answer.tokens[:-1])
    known = model.__dict__.setdefault("known_logits", {})
    if fed not in known:
        known[fed] = compute_logits(model, fed)[len(answer.prompt) - 1 :]
    return known[fed]


@torch.inference_mode()
def compute_logits(model: Any, ids: Sequence[int]) -> Any:
    """transformers' logits of a whole text, without a cache: shape [tokens, vocabulary]."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()

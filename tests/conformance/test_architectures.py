"""Every architecture on every engine, against transformers' own arithmetic: float32, eager, without a cache."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, BOUNDARY
from reference import NEW_TOKENS, TOKENS, Answer, build_prompt, compute_logits, reference_logits

from phibatch.contract import EngineName
from phibatch.errors import EngineError
from phibatch.model.engine.slots import CHUNK

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
ONNX_ENGINES = (EngineName.SLOTS, EngineName.GENAI)
SHORT = (3, 40, 300)
PIECES = (CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK, 2 * CHUNK + 1)
"""Lengths around those at which the slots engine cuts a prompt."""

NOT_BUILT = {"SmolLM3": "KeyError: 'position_ids'", "Gemma-3": "KeyError: 'rope_type'"}
"""What the installed builder, with the installed transformers, ends with where it can not build an architecture."""

INT8_SLACK = 1.5
"""How many times the error of simulated int8 activations an engine's may be. Simulated is round-to-nearest in blocks of
32, which is what the kernels do (`accuracy_level` 4); they differ in how blocks are cut along a row and in when they
round the scale, which is worth some tens of per cent of an error that is itself random."""

OUTCOMES: dict[tuple[str, str], str] = {}


def lengths_of(name: str) -> list[int]:
    """Short rows, long ones, those around the boundaries of pieces, windows and tables; long and short ones mixed."""
    architecture = ARCHITECTURES[name]
    lengths = [*SHORT, *PIECES, 700]
    if architecture.window:
        edge = architecture.window
        lengths += [edge - NEW_TOKENS, edge - 2, edge, edge + 1, edge + 250, min(3700, 4 * edge)]
    if architecture.boundary:
        lengths += [1312, BOUNDARY - NEW_TOKENS, BOUNDARY - NEW_TOKENS + 1, 4300]
    return sorted(set(lengths), key=lambda length: (length * 7919) % 97)


def refused_beyond(answers: dict[int, Answer]) -> tuple[int, str] | None:
    """From which length on rows are refused, and why; every refusal must have its reason, and no shorter row one."""
    refused = sorted(length for length, answer in answers.items() if answer.completion.error_code)
    for length in refused:
        assert answers[length].completion.error_code == "context_length_exceeded"
    answered = [length for length, answer in answers.items() if not answer.completion.error_code]
    if not refused:
        return None
    assert max(answered) < refused[0]
    return refused[0], answers[refused[0]].completion.error_message


def folder_of(built: Any, name: str, precision: str) -> Path:
    failure = built(name).build(precision)
    if failure or name in NOT_BUILT:
        assert failure == NOT_BUILT.get(name), "the builder fails with another reason, or no more: see NOT_BUILT"
        OUTCOMES[name, "slots"] = OUTCOMES[name, "genai"] = f"not built: the builder ends with `{failure}`"
        pytest.skip(f"the builder can not build it: {failure}")
    return built(name).folder(precision)


@pytest.mark.parametrize("engine", ONNX_ENGINES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fp32_answers_are_those_of_transformers(built, generate, name, engine):
    """Greedy answers of fp32 weights are transformers', token by token; rows that can not be answered are refused."""
    folder = folder_of(built, name, "fp32")
    try:
        answers = generate(folder, engine, lengths_of(name))
    except EngineError as error:
        OUTCOMES[name, str(engine)] = f"refused: {error}"
        return
    for length, answer in answers.items():
        if answer.completion.error_code:
            continue
        assert len(answer.tokens) == NEW_TOKENS or answer.tokens[-1] == TOKENS["eos_token_id"]
        expected = reference_logits(built(name).reference, answer).argmax(axis=-1).tolist()
        assert answer.tokens == expected, f"a prompt of {length} tokens"
    beyond = refused_beyond(answers)
    assert beyond is None or ARCHITECTURES[name].boundary, "windows are honoured"
    OUTCOMES[name, str(engine)] = "equal" if beyond is None else f"equal; {_reason(beyond[1])}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_checkpoint_answers_as_transformers_does(built, generate, name):
    """The transformers engine's answers, in batches of unequal rows, are those of each row by itself."""
    edge = ARCHITECTURES[name].window
    lengths = [*SHORT, 700, *([edge - NEW_TOKENS, edge + 1, edge + 250] if edge else [])]
    lengths += [1312, BOUNDARY - NEW_TOKENS, 4300] if ARCHITECTURES[name].boundary else []
    answers = generate(built(name).checkpoint, EngineName.TRANSFORMERS, lengths)
    for length, answer in answers.items():
        expected = reference_logits(built(name).reference, answer).argmax(axis=-1).tolist()
        assert answer.tokens == expected, f"a prompt of {length} tokens"
    assert refused_beyond(answers) is None
    OUTCOMES[name, "transformers"] = "equal"


@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if each.boundary])
def test_long_rows_alone_have_the_long_table(built, generate, name):
    """The first rows of an engine are answered as later ones are, though the library makes the long table then."""
    (answer,) = generate(built(name).checkpoint, EngineName.TRANSFORMERS, [4300], batch_size=1).values()
    assert answer.tokens == reference_logits(built(name).reference, answer).argmax(axis=-1).tolist()


@pytest.mark.parametrize("engine", ONNX_ENGINES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_int4_logits_are_within_the_error_of_int8_activations(built, generate, name, engine):
    """Logits of int4 weights differ from float32 arithmetic on the same weights by no more than int8 activations do."""
    folder = folder_of(built, name, "int4")
    model = built(name).int4_reference
    ours, simulated = [], []
    for answer in generate(folder, engine, (40, 257, 700)).values():
        if answer.completion.error_code:
            continue
        exact = reference_logits(model, answer)
        with int8_activations(model):
            fed = answer.prompt + answer.tokens[:-1]
            rounded = compute_logits(model, fed)[len(answer.prompt) - 1 :]
        ours.append(np.abs(answer.logits - exact).mean())
        simulated.append(np.abs(rounded - exact).mean())
    assert np.mean(ours) <= INT8_SLACK * np.mean(simulated), (np.mean(ours), np.mean(simulated))


@pytest.mark.parametrize("engine", ONNX_ENGINES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_do_not_change_with_their_neighbours(built, generate, name, engine):
    """A row's answer is the same in any batch, in any order, and beside any other rows, short or long."""
    folder = folder_of(built, name, "int4")
    lengths = [*SHORT, CHUNK + 1, 1312, *([4300] if ARCHITECTURES[name].boundary else [])]
    ways = [(lengths, 4), (lengths[::-1], 3), (sorted(lengths), 8), (lengths[:2], 2), (lengths[:1], 1)]
    first, *others = [generate(folder, engine, rows, batch_size) for rows, batch_size in ways]
    for answers in others:
        for length, answer in answers.items():
            assert answer.tokens == first[length].tokens, f"a prompt of {length} tokens"
            assert answer.completion.error_code == first[length].completion.error_code


@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if each.window or each.boundary])
def test_a_wrong_window_or_table_would_show(built, words, name):
    """The weights are strong enough: without its window, or by the other table, logits are others."""
    architecture, model = ARCHITECTURES[name], built(name).reference
    length = min(3700, 2 * architecture.window) if architecture.window else 1312
    _, ids = build_prompt(words, length)
    right = compute_logits(model, ids)[-1]
    with _without_window(model) if architecture.window else _other_table(model):
        wrong = compute_logits(model, ids)[-1]
    assert np.abs(right - wrong).mean() > 0.2 * right.std()


def test_the_page_says_what_was_found():
    """docs/architectures.md is what this suite found; `make conformance WRITE=1` writes it."""
    if len(OUTCOMES) < 3 * len(ARCHITECTURES):
        pytest.skip("only a whole run of the suite knows all outcomes")
    page = _render()
    if os.environ.get("PHIBATCH_WRITE_PAGE"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page


@contextmanager
def int8_activations(model: Any) -> Any:
    """Round what enters each quantised product to int8, in blocks of 32 with a scale of max|x|/127."""

    def round_input(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        blocks = inputs[0].reshape(*inputs[0].shape[:-1], -1, 32)
        scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
        rounded = torch.where(scale == 0, blocks, (blocks / scale).round() * scale)
        return (rounded.reshape(inputs[0].shape),)

    hooks = [
        module.register_forward_pre_hook(round_input)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without_window(model: Any) -> Any:
    config = model.config
    kept, config.sliding_window = config.sliding_window, 10**6
    try:
        yield
    finally:
        config.sliding_window = kept


@contextmanager
def _other_table(model: Any) -> Any:
    rope = model.config.rope_parameters
    rope["original_max_position_embeddings"] = 0
    try:
        yield
    finally:
        rope["original_max_position_embeddings"] = BOUNDARY


def _reason(message: str) -> str:
    """Of a refusal, what it says of the model."""
    tokens, reason = message.split(" answers up to ", 1)[1].split(": ", 1)
    return f"rows of more than {tokens} tokens are refused: {reason}"


def _render() -> str:
    engines = ("slots", "genai", "transformers")
    rows = [f"| {name} | {' | '.join(OUTCOMES[name, engine] for engine in engines)} |" for name in ARCHITECTURES]
    template = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    return template.replace("{rows}", "\n".join(rows)).replace("{slack}", str(INT8_SLACK))

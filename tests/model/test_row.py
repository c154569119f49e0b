import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phibatch import demo
from phibatch.contract import FinishReason, GenerationParams, Message, Request
from phibatch.errors import RowError
from phibatch.model.engine.genai import open_tokenizer
from phibatch.model.engine.row import Row
from phibatch.model.folder import ModelFolder
from phibatch.model.grammar import Grammars

FILE = demo.MODEL_DIR / "tokenizer.json"
FOLDER = ModelFolder.open(demo.MODEL_DIR)
TOKENIZER = open_tokenizer(demo.MODEL_DIR)
GRAMMARS = Grammars(FILE, FOLDER.eos_token_ids)
VOCABULARY = max(FOLDER.eos_token_ids) + 64
texts = st.text(alphabet=st.sampled_from("ab \n.éσ👍"), min_size=1, max_size=24)


def say(text, **params):
    """A row to which the model says a text, token by token, until the row is done."""
    row = Row(
        Request(GenerationParams(**params), (Message("user", "go"),)),
        TOKENIZER,
        FOLDER.context_length,
        FOLDER.eos_token_ids,
        GRAMMARS,
    )
    row.admit()
    for token in [*TOKENIZER.encode_prompt(text), min(FOLDER.eos_token_ids)]:
        logits = np.zeros(VOCABULARY, dtype=np.float32)
        logits[token] = 9
        row.step(logits)
        if row.done:
            break
    return row.completion()


@settings(max_examples=200, deadline=None)
@given(text=texts, stop=st.lists(st.text(alphabet="ab \n.é", min_size=1, max_size=3), max_size=3))
def test_an_answer_is_cut_before_the_first_stop_string(text, stop):
    """Whatever tokens it lies across: the answer is the text up to the first place where any of them begins."""
    found = say(text, stop=tuple(stop), max_tokens=200)
    said = TOKENIZER.decode(TOKENIZER.encode_prompt(text))
    places = [place for each in stop if (place := said.find(each)) >= 0]
    assert found.finish_reason == FinishReason.STOP
    if not places:
        assert found.text == said
        return
    # It ends at the token that completes a stop string, before one that begins earlier could be complete.
    assert said.startswith(found.text)
    assert not any(each in found.text for each in stop)
    assert any(said.startswith(each, len(found.text)) for each in stop)


@settings(max_examples=100, deadline=None)
@given(text=texts, limit=st.integers(min_value=1, max_value=30))
def test_a_limit_counts_tokens_without_the_last_one(text, limit):
    """`length` exactly where the limit cuts; the end-of-turn token is not counted."""
    ids = TOKENIZER.encode_prompt(text)
    found = say(text, max_tokens=limit)
    assert found.usage.completion_tokens == min(limit, len(ids))
    assert found.finish_reason == (FinishReason.LENGTH if limit <= len(ids) else FinishReason.STOP)


control = st.sampled_from(["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>", "<s>", "\0", "\n"])
characters = st.characters(exclude_categories=["Cs"])  # a surrogate alone is refused: see test_chat
contents = st.lists(control | st.text(characters, max_size=12), min_size=1, max_size=6).map("".join)


@settings(max_examples=200, deadline=None)
@given(content=contents.filter(str.strip))
def test_no_text_can_open_or_end_a_turn(content):
    """A message of any characters, control tokens spelled out among them, has as many control tokens as a plain one."""
    ids = TOKENIZER.encode_messages((Message("system", content), Message("user", content)))
    plain = TOKENIZER.encode_messages((Message("system", "x"), Message("user", "x")))
    known = {token["id"] for token in json.loads(FILE.read_text())["added_tokens"]}
    assert [token for token in ids if token in known] == [token for token in plain if token in known]


def test_a_prompt_of_megabytes_is_a_rows_error():
    """It is encoded, found too long, and refused; nothing is generated."""
    request = Request(GenerationParams(), (Message("user", "word " * 2_000_000),))
    with pytest.raises(RowError, match="leaves no room to answer"):
        Row(request, TOKENIZER, FOLDER.context_length, FOLDER.eos_token_ids, GRAMMARS)

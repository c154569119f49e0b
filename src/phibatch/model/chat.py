"""Messages to token ids, with the model's own chat template and tokenizer."""

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from phibatch.contract import ErrorCode, Message
from phibatch.errors import EngineError, RowError

logger = logging.getLogger(__name__)


NO_SYSTEM = (
    "the model's chat template has no place for a system message: its text goes before the first user turn's text"
)
"""What a run says once, without a word of the row's."""


class ChatTokenizer:
    """The tokenizer of a model, which tells the template's control tokens from the same characters in a message.

    A tokenizer takes `<|user|>` inside a message for the control token, so that a row could open a turn of its own.
    Encoding message and template apart would change the ids (leading spaces, merges, swallowed newlines). So the
    conversation is encoded whole, by a copy of the tokenizer in which every control token has a secret name: the
    template's are renamed, the messages' are left, and are ordinary text. Without control text in the messages the ids
    are those of the rendered template, exactly.

    Args:
        file: the model's `tokenizer.json`.
        render: the model's chat template: a conversation to text, up to where the answer begins. Raises ValueError
            or RuntimeError when the template refuses the conversation.
    """

    def __init__(self, file: Path, render: Callable[[Sequence[Message]], str]) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        self._render = render
        self._has_said = False
        self._plain = Tokenizer.from_str(json.dumps(content))
        # Marks of private-use characters and a random name: a message can not hold one, save by guessing.
        nonce = secrets.token_hex(16)
        visible = [token["content"] for token in content["added_tokens"] if token["content"].strip()]
        # The longest first, so that no name is replaced inside another.
        visible.sort(key=len, reverse=True)
        self._names = {name: f"\ue000{nonce}c{place}\ue001" for place, name in enumerate(visible)}
        # NUL is marked too: onnxruntime-genai's template engine ends its text there.
        self._marks = {name: f"\ue000{nonce}m{place}\ue001" for place, name in enumerate([*visible, "\0"])}
        self._renamed = Tokenizer.from_str(json.dumps(_rename(content, self._names)))
        for token in content["added_tokens"]:
            name = self._names.get(token["content"], token["content"])
            if self._renamed.token_to_id(name) != token["id"]:
                raise EngineError(f"the tokenizer's control token {token['content']} can not be told from text")

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, ready for the answer.

        Where the template has no place for a system message, its text goes before the first user turn's.

        Raises:
            RowError: the template refuses the conversation, or a text is broken.
        """
        _check_text(message.content for message in messages)
        if any(message.role == "system" for message in messages) and not self.takes_system:
            if not self._has_said:
                logger.warning(NO_SYSTEM)
                self._has_said = True
            messages = _merge_system(messages)
        marked = [Message(message.role, _replace(message.content, self._marks)) for message in messages]
        try:
            rendered = self._render(marked)
        except (ValueError, RuntimeError) as error:
            raise RowError(
                ErrorCode.INVALID_REQUEST, f"the chat template refuses the conversation: {first_line(error)}"
            ) from error
        renamed = _replace(rendered, self._names)
        text = _replace(renamed, {mark: name for name, mark in self._marks.items()})
        return list(self._renamed.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids of a text whose control tokens are meant."""
        _check_text([prompt])
        return list(self._plain.encode(prompt, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without control tokens."""
        return str(self._plain.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system message: some drop it without a word, others refuse it."""
        mark = secrets.token_hex(16)
        try:
            return mark in self._render([Message("system", mark), Message("user", "x")])
        except (ValueError, RuntimeError):
            return False

    def check_template(self) -> None:
        """Raise ValueError or RuntimeError where the template does not render one user turn with its text."""
        mark = secrets.token_hex(16)
        if mark not in self._render([Message("user", mark)]):
            raise ValueError("the chat template loses the text of a user turn")


def _merge_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation with the system message's text before the first user turn's, and a blank line between them.

    Microsoft took the system branch out of Phi-3's template in April 2024 (commit 300945e of Phi-3-mini-4k-instruct)
    and advised to put the text into the first user prompt (the repository's discussion 51). It named no separator: the
    blank line is that of Gemma 3's template, which does the same by itself.
    """
    system = [message.content for message in messages if message.role == "system"]
    others = [message for message in messages if message.role != "system"]
    first = next(place for place, message in enumerate(others) if message.role == "user")
    others[first] = Message("user", "\n\n".join([*system, others[first].content]))
    return others


def first_line(error: Exception) -> str:
    """What a library says went wrong, without the lines that follow."""
    return str(error).splitlines()[0].rstrip(":") if str(error).strip() else "no reason given"


def _check_text(texts: Iterable[str]) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise RowError(ErrorCode.INVALID_REQUEST, "the text holds half of a character (a lone surrogate)") from error


def _replace(text: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


def _rename(content: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A `tokenizer.json` whose added tokens have other names and the same ids."""
    model = content["model"]
    if isinstance(model["vocab"], dict):
        vocab: Any = {names.get(token, token): number for token, number in model["vocab"].items()}
    else:
        vocab = [[names.get(token, token), score] for token, score in model["vocab"]]
    unknown = model.get("unk_token")
    model = {**model, "vocab": vocab, "unk_token": names.get(unknown, unknown)}
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in content["added_tokens"]]
    # A post-processor only acts on `add_special_tokens`, and would name tokens that are gone.
    return {**content, "model": model, "added_tokens": added, "post_processor": None}

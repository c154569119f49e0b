"""One request on its way through an engine: what it has said, and whether it is done."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from phibatch.contract import Completion, ErrorCode, FinishReason, Request, Usage
from phibatch.errors import EngineError, RowError
from phibatch.model.chat import ChatTokenizer
from phibatch.model.engine import watchdog
from phibatch.model.engine.sampling import Logits, Sampler
from phibatch.model.grammar import Grammars


class Row:
    """A request with its prompt's ids, from admission to its last token.

    Args:
        request: what is asked for.
        tokenizer: the model's.
        context_length: prompt and completion together, in tokens.
        eos_token_ids: the tokens that end a turn.
        grammars: of the model's vocabulary.
        timeout: seconds from admission after which the row is cut off; 0 is never.

    Attributes:
        prompt: its ids.
        limit: the most tokens to generate: `max_tokens`, or what the context leaves.
        finish_reason: why the row is done; None until then, and where it was cut off.
        done: whether it is.
        cached_tokens: tokens of the prompt that the engine did not have to compute.
        length: tokens that the engine holds keys and values of.

    Raises:
        RowError: the prompt leaves no room for a token, or can not be rendered.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: ChatTokenizer,
        context_length: int,
        eos_token_ids: frozenset[int],
        grammars: Grammars,
        timeout: float = 0.0,
    ) -> None:
        if request.prompt is not None:
            self.prompt = tokenizer.encode_prompt(request.prompt)
        else:
            self.prompt = tokenizer.encode_messages(request.messages)
        if not self.prompt:
            raise RowError(ErrorCode.INVALID_REQUEST, "the prompt is empty")
        if len(self.prompt) >= context_length:
            raise RowError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {len(self.prompt)} tokens, and a context of {context_length} leaves no room to answer",
            )
        self.limit = min(request.params.max_tokens, context_length - len(self.prompt))
        self.finish_reason: FinishReason | None = None
        self.done = False
        self.cached_tokens = 0
        self.length = 0
        wanted = request.params.response_format
        self._constraint = grammars.constrain(wanted) if wanted else None
        self._stop = request.params.stop
        self._sampler = Sampler(request.params, self.prompt)
        self._timeout = timeout
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._ids: list[int] = []
        self._text: str | None = None
        self._admitted = 0.0
        self._ended = 0.0
        self._created = 0.0

    def admit(self) -> None:
        """Start the row's clock."""
        self._admitted = time.perf_counter()

    def step(self, logits: Logits) -> int:
        """Choose the next token from logits of shape [vocabulary], keep it, and see whether it was the last."""
        if self._constraint:
            logits = self._constraint.mask(logits)
        token = self._sampler.choose(logits)
        if token in self._eos_token_ids:
            self._finish(FinishReason.STOP)
            return token
        self._ids.append(token)
        if self._constraint:
            self._constraint.accept(token)
        if self._stop:
            # Decoded whole each time: a stop string may lie across tokens, and half a character is no text yet.
            text = self._tokenizer.decode(self._ids)
            places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
            if places:
                self._text = text[: min(places)]
                self._finish(FinishReason.STOP)
                return token
        if len(self._ids) == self.limit:
            self._finish(FinishReason.LENGTH)
        elif self._timeout and time.perf_counter() - self._admitted > self._timeout:
            self._finish(None)
        return token

    @property
    def last_token(self) -> int:
        """The token chosen last."""
        return self._ids[-1]

    def admission(self) -> Completion:
        """What is known of a row before anything is generated: its prompt's tokens."""
        return Completion("", None, Usage(len(self.prompt)))

    def completion(self) -> Completion:
        """The answer of a finished row."""
        text = self._tokenizer.decode(self._ids) if self._text is None else self._text
        usage = Usage(len(self.prompt), len(self._ids), self.cached_tokens)
        if self.finish_reason is None:
            message = f"the row was not done after {self._timeout:g} s; its text so far is kept"
            return Completion(
                text, None, usage, self._ended - self._admitted, ErrorCode.TIMEOUT, message, created=self._created
            )
        if self._constraint and (not self._constraint.complete or self._text is not None):
            cut = "max_tokens" if self._text is None else "a stop string"
            return Completion.failed(
                ErrorCode.INVALID_OUTPUT, f"{cut} cut the answer before it was of its response_format", usage
            )
        return Completion(text, self.finish_reason, usage, self._ended - self._admitted, created=self._created)

    def _finish(self, reason: FinishReason | None) -> None:
        self.finish_reason = reason
        self.done = True
        self._ended = time.perf_counter()
        self._created = time.time()


def generate_rows(
    requests: Sequence[Request], build_row: Callable[[Request], Row], run: Callable[[list[Row]], None] | None
) -> list[Completion]:
    """One completion per request, in order.

    Args:
        requests: what is asked for.
        build_row: a request as a row of the engine. Raises RowError, which fails that row alone.
        run: generates rows to their end; None only counts their prompts' tokens.
    """
    outcomes: dict[int, Completion] = {}
    rows: dict[int, Row] = {}
    for place, request in enumerate(requests):
        try:
            rows[place] = build_row(request)
        except RowError as error:
            outcomes[place] = Completion.failed(error.code, str(error))
    if run:
        run(list(rows.values()))
    outcomes.update({place: row.completion() if run else row.admission() for place, row in rows.items()})
    return [outcomes[place] for place in range(len(requests))]


def choose_tokens(rows: Sequence[Row], logits: Logits) -> NDArray[np.int64]:
    """Let every row that is not done choose its next token.

    Args:
        rows: the batch.
        logits: shape [at least len(rows), vocabulary], a line for each row.

    Returns:
        Shape [lines of logits], zero where there is no row or it is done.

    Raises:
        EngineError: the logits are not numbers.
    """
    watchdog.step()
    if not np.isfinite(logits).all():
        raise EngineError("the model's logits are not finite: the weights or the CPU kernels are broken")
    choices = np.zeros(len(logits), dtype=np.int64)
    for place, row in enumerate(rows):
        if not row.done:
            choices[place] = row.step(logits[place])
    return choices

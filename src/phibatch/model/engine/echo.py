"""The weightless engine: says the last message back. For tests, and for trying a job without paying for a model."""

import re
import time
from collections.abc import Sequence

import phibatch
from phibatch.contract import Completion, EngineName, FinishReason, Request, Usage


class EchoEngine:
    """Answers with the last message's text (or the prompt's), where a token is a word with the space before it.

    `max_tokens` and `stop` hold as for a real engine, and usage counts words.
    """

    name = EngineName.ECHO.value
    version = f"phibatch {phibatch.__version__}"

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [_echo(request) for request in requests]

    def count(self, requests: Sequence[Request]) -> list[Completion]:
        return [Completion("", None, Usage(_echo(request).usage.prompt_tokens)) for request in requests]


def _echo(request: Request) -> Completion:
    started = time.perf_counter()
    texts = [message.content for message in request.messages] or [request.prompt or ""]
    words = re.findall(r"\s*\S+", texts[-1])
    text = "".join(words[: request.params.max_tokens])
    finish_reason = FinishReason.LENGTH if len(words) > request.params.max_tokens else FinishReason.STOP
    cut = min((place for stop in request.params.stop if (place := text.find(stop)) >= 0), default=None)
    if cut is not None:
        text, finish_reason = text[:cut], FinishReason.STOP
    usage = Usage(sum(len(text.split()) for text in texts), len(text.split()))
    return Completion(text, finish_reason, usage, time.perf_counter() - started)

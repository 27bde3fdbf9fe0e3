"""Student text as data: nothing in it can open a chat turn or fill the prompt."""

from __future__ import annotations

import re

#: Where a control token of some chat template could begin or end: <|im_start|> and harmony's
#: <|channel|>, Gemma's <start_of_turn>, Llama's [INST] and <<SYS>>, <think>, </tool_call>, <s>; and
#: DeepSeek's, with the full-width bar U+FF5C (U+FF1C and U+FF1E are full-width < and >).
#: The match ends where the token is to be broken.
_CONTROL = re.compile(
    r"[<\uff1c](?=[|\uff5c])|[|\uff5c](?=[>\uff1e])"
    r"|<(?=</?SYS>>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG)\])"
    r"|<(?=/?(?:s|bos|eos|pad|unk|mask|think|thinking|reasoning|start_of_turn|end_of_turn"
    r"|tool_call|tool_response|tools|system|user|assistant|end_of_text)>)",
    re.IGNORECASE,
)


def defused(text: str) -> str:
    """``text`` with a space inside whatever looks like a control token of a chat template."""
    return _CONTROL.sub(lambda match: match[0] + " ", text)


def quoted(text: str, limit: int) -> str:
    """Student text for a prompt: defused, at most ``limit`` characters, valid Unicode.

    Of a longer text the beginning and the end stay, with the number of characters left out between
    them: the beginning shows how the student set out, the end holds its answer.
    """
    text = text.encode("utf-8", "replace").decode()
    if len(text) > limit:
        head = limit // 3
        tail = limit - head
        text = f"{text[:head]} [{len(text) - limit} characters left out] {text[-tail:]}"
    return defused(text)

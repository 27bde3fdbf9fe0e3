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

#: Characters that hide text from people but not from models (tags), or reorder it (bidi controls).
_HIDDEN = re.compile("[\U000e0000-\U000e007f\u202a-\u202e\u2066-\u2069]")


def defused(text: str) -> str:
    """``text`` as valid Unicode, with a space inside whatever looks like a control token.

    Characters that would hide or reorder what stands around them become U+FFFD.
    """
    text = _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", text.encode("utf-8", "replace").decode())
    return _CONTROL.sub(lambda match: match[0] + " ", text)


def quoted(text: str, limit: int) -> str:
    """Student text for a prompt: at most about ``limit`` characters of it, defused.

    Of a longer text the beginning and the end stay, with the number of characters left out between
    them: the beginning shows how the student set out, the end holds its answer.
    """
    if len(text) > limit:
        head = limit // 3
        tail = limit - head
        text = f"{text[:head]} [{len(text) - limit} characters left out] {text[-tail:]}"
    return defused(text)

"""Chat templates of the kinds that users have, on the toy tokenizer, and what is learned, by rendering alone."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoTokenizer

from support.files import TOY

OPEN = "{{ '[' + m.role + ']' }}"
PROMPT = "{% if add_generation_prompt %}[assistant]{% endif %}"
PLAIN = "{% for m in messages %}" + OPEN + "{{ m.content + eos_token }}{% endfor %}" + PROMPT
TRIMMED = PLAIN.replace("m.content +", "m.content | trim +")
SYSTEM = "{% if messages[0].role != 'system' %}[system]be good<eos>{% endif %}" + PLAIN
DATED = "[system]today is {{ strftime_now('%d %b %Y %H:%M:%S.%f') }}<eos>" + PLAIN
STRICT = (
    "{% if not messages %}{{ raise_exception('Cannot apply chat template to an empty conversation') }}{% endif %}"
    + PLAIN
)
CUT = PLAIN.replace(
    "{{ m.content + eos_token }}",
    "{% set said = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}{{ said + eos_token }}",
)
FORGETS = PLAIN.replace(
    "{{ m.content + eos_token }}",
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}{{ eos_token }}",
)
DEAF = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
BLOCKS = (
    "{% for m in messages %}" + OPEN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}" + PROMPT
)
RICH = (
    "{% if tools %}{{ '[tools]' + (tools | tojson) + eos_token }}{% endif %}{% for m in messages %}"
    + OPEN
    + "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '[call]' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ eos_token }}{% endfor %}" + PROMPT
)
STRINGS = RICH.replace("(c.function.arguments | tojson)", "('' + c.function.arguments)")
SAME = {"plain": PLAIN, "trimmed": TRIMMED, "system": SYSTEM, "strict": STRICT, "blocks": BLOCKS, "rich": RICH}
"""Those that say what a row says."""


@functools.cache
def tokenizer_with(template: str | None) -> Any:
    """The toy tokenizer, which has a token a byte, with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer: Any, encoded: Any) -> list[str]:
    """What is learned of a row, as texts: runs of learned tokens, decoded."""
    ids = encoded.input_ids
    positions = [*encoded.earlier, *range(encoded.response_start, len(ids))]
    runs: list[list[int]] = []
    for before, position in zip([None, *positions], positions, strict=False):
        if before is None or position != before + 1:
            runs.append([])
        runs[-1].append(ids[position])
    return [tokenizer.decode(run) for run in runs]


def reference(tokenizer: Any, messages: list[dict], wanted: list[int], tools: Any = None) -> tuple[str, list[str]]:
    """The text of a conversation up to its last learned answer, and what is learned of it, by the tokenizer alone.

    Every learned answer goes from the end of the prompt before it to the first EOS; where there is no prompt to render,
    it begins where the header of an answer ends.
    """

    def render(turns: list[dict], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=prompt)

    if tokenizer.chat_template is None:
        pieces = [m["content"] + ("<eos>" if m["role"] == "assistant" else "\n") for m in messages]
        text, starts = "".join(pieces), [len("".join(pieces[:n])) for n in wanted]
    else:
        text = render(messages)
        starts = []
        for n in wanted:
            alone = render(messages[: n + 1])
            starts.append(alone.rindex("[assistant]") + len("[assistant]"))
    stops = [text.index("<eos>", start) + len("<eos>") for start in starts]
    return text[: stops[-1]], [text[start:stop] for start, stop in zip(starts, stops, strict=True)]

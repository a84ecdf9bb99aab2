"""Finds what of a rendered conversation is learned: by the template's generation blocks, or by verified prefixes.

Example: in `<user>2+3?<assistant>5<end>` the answer begins where `<user>2+3?<assistant>`, the same conversation
rendered up to the question, ends. What is learned is then compared with what the row says. Left out: cutting to
`max_length`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from lit_bilevel.data.template import Conversation, Template, says

Span = tuple[int, int]


class Draft(NamedTuple):
    """A rendered conversation.

    Args:
        text: the whole.
        spans: of characters that are learned, one for each learned answer.
        notice: in what the text differs from what the row says.
    """

    text: str
    spans: list[Span]
    notice: str | None


def draft(template: Template, talk: Conversation, learned: Sequence[int]) -> Draft:
    """Render a conversation and find its learned answers by prefixes.

    Args:
        template: without generation blocks.
        talk: the conversation.
        learned: positions of the answers that are learned.

    Raises:
        ValueError: if no mask would be right, or nothing of an answer is left.
    """
    text = template.render(talk.messages, talk.tools)
    spans = [_span(template, talk, number, text) for number in learned]
    return Draft(text, spans, _notice(template, talk, text, [text[a:b] for a, b in spans], learned))


def _span(template: Template, talk: Conversation, number: int, text: str) -> Span:
    """The characters of an assistant turn."""
    prompt = template.before(talk, number)
    if not text.startswith(prompt):
        raise ValueError(f"the full text does not begin with the prompt of turn {number + 1}, so no mask is right")
    if number == len(talk.messages) - 1:
        return len(prompt), len(text)
    alone = template.render(talk.messages[: number + 1], talk.tools)
    content = talk.messages[number]["content"].strip()
    for turn in (alone[len(prompt) :], content + alone.rpartition(content)[2] if content else ""):
        if turn and alone.startswith(prompt) and text.startswith(turn, len(prompt)):
            return len(prompt), len(prompt) + len(turn)
    raise ValueError(
        f"turn {number + 1} is rendered in another way when more turns follow, so it cannot be masked; use"
        " `data.train_on: last` or a template with generation blocks"
    )


def by_blocks(
    template: Template, talk: Conversation, learned: Sequence[int], every: bool
) -> tuple[list[int], list[Span], str | None]:
    """Token ids, the spans of learned tokens and the notice, by the template's generation blocks.

    Args:
        template: with generation blocks.
        talk: the conversation.
        learned: positions of the answers that are learned.
        every: whether these are all answers that may be, or the last one only.

    Raises:
        ValueError: if the blocks do not say what is learned, or nothing of an answer is left.
    """
    result = template.apply_with_masks(talk.messages, talk.tools)
    ids, mask = list(result["input_ids"]), list(result["assistant_masks"])
    edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
    spans = [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    if not spans:
        raise ValueError("the template's generation blocks hold nothing of it")
    answers = [number for number, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if len(spans) == len(answers):
        spans = [span for number, span in zip(answers, spans, strict=True) if number in learned]
    elif every and len(learned) < len(answers):
        raise ValueError(
            f"the template's generation blocks hold {len(spans)} parts of its {len(answers)} answers, so those that are"
            " not to be learned cannot be told"
        )
    else:
        spans = spans if every else spans[-1:]
    said = [cast("str", template.tokenizer.decode(ids[start:stop])) for start, stop in spans]
    return ids, spans, _notice(template, talk, template.render(talk.messages, talk.tools), said, learned)


def _notice(
    template: Template, talk: Conversation, text: str, said: Sequence[str], learned: Sequence[int]
) -> str | None:
    """In what a rendered row differs from what it says.

    Raises:
        ValueError: if nothing of an answer is left.
    """
    for part, number in zip(said, learned, strict=False):
        message = talk.messages[number]
        if says(part, message["content"]):
            continue
        left = template.special.sub("", part).strip()
        if not left:
            raise ValueError("the chat template leaves nothing of its answer; give one that keeps it")
        if len(said) == len(learned):
            return f"the chat template rewrites the answer: {left[:60]!r} is learned of {message['content'][:60]!r}"
    return template.find_omission(talk, text)


def covering(offsets: list[Span], span: Span) -> Span:
    """The tokens that reach into a span of characters."""
    start = next((i for i, (_, end) in enumerate(offsets) if end > span[0]), len(offsets))
    stop = next((i for i in range(start, len(offsets)) if offsets[i][0] >= span[1]), len(offsets))
    return start, stop

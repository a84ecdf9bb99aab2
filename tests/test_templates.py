"""Chat templates, masks and truncation, against transformers' own `apply_chat_template`."""

from __future__ import annotations

import pytest
from support.files import write_jsonl
from support.formats import LONG, RECORDS, as_messages, read
from support.sources import Source
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_bilevel.data.announce import show_row
from lit_bilevel.data.collate import collate
from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.examples import Examples
from lit_bilevel.data.table import column, encode_rows, write_rows
from lit_bilevel.errors import UserError
from lit_bilevel.types import Example, Row

HEADER = "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"

LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    + HEADER
    + "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

QWEN = """\
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and loop.index0 > ns.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{{- message.content.strip() + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

NEOX = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}Assistant: {% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)

KINDS = {  # special tokens: BOS, EOS, and others; the template
    "llama": (
        {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>"},
        ["<|start_header_id|>", "<|end_header_id|>"],
        LLAMA,
    ),
    "qwen3": ({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, ["<|im_start|>"], QWEN),
    "neox": ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, [], NEOX),
}


def tokenizer_of(kind: str, chat: bool) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer in the style of a family."""
    named, others, template = KINDS[kind]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = sorted({*named.values(), *others})
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(
        ["What is a cat? A small animal. User: Assistant: and a dog", "four and five are nine"], trainer
    )
    if kind == "llama":
        from tokenizers.processors import TemplateProcessing

        raw.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", raw.token_to_id("<|begin|>"))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, **named, additional_special_tokens=others, name_or_path=f"made/{kind}"
    )
    made.chat_template = template if chat else None
    return made


@pytest.fixture(scope="module")
def tokenizers():
    return {(kind, chat): tokenizer_of(kind, chat) for kind in KINDS for chat in (False, True)}


def expected_ids(tokenizer, turns, train_on):
    """Ids and learned positions by transformers alone: the template's ids up to EOS, masks by decoding."""
    if not tokenizer.chat_template or len(turns) == 1:
        ids = tokenizer("").input_ids
        learned = []
        for role, text in turns:
            start = len(ids)
            ids = ids + tokenizer(text if role == "assistant" else text + "\n", add_special_tokens=False).input_ids
            if role == "assistant":
                ids = [*ids, tokenizer.eos_token_id]
                learned.append(range(max(1, start), len(ids)))
    else:
        whole = tokenizer.apply_chat_template(as_messages(turns), tokenize=True, return_dict=True)["input_ids"]
        last = max(i for i, token in enumerate(whole) if token == tokenizer.eos_token_id)
        ids = whole[: last + 1]
        learned, stop = [], 0
        ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
        for role, text in turns:
            if role != "assistant":
                continue
            stop = next(e for e in ends if e >= stop and text in tokenizer.decode(ids[stop : e + 1]))
            thought = (
                "<think>\n\n</think>\n\n" if (role, text) == turns[-1] and "<think>" in tokenizer.decode(ids) else ""
            )
            start = stop
            while thought + text not in tokenizer.decode(ids[start:stop]):
                start -= 1
            learned.append(range(start, stop + 1))
            stop += 1
    return ids, [i for span in (learned if train_on == "all" else learned[-1:]) for i in span]


@pytest.mark.parametrize("train_on", ["last", "all"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_masks_are_those_of_transformers(tmp_path, tokenizers, kind, chat, train_on):
    tokenizer = tokenizers[kind, chat]
    encoder = Encoder(tokenizer, 400, train_on=train_on)
    for name, (_, record, turns) in RECORDS.items():
        encoded = encoder.rows([read(tmp_path, record)])[0]
        assert not isinstance(encoded, ValueError), (name, encoded)
        ids, learned = expected_ids(tokenizer, turns, train_on)
        assert encoded.input_ids == ids, name
        if chat and len(turns) > 1:
            text = tokenizer.apply_chat_template(as_messages(turns), tokenize=False)
            assert text.rstrip("\n") == tokenizer.decode(encoded.input_ids), name
        assert [*encoded.earlier, *range(encoded.response_start, len(ids))] == learned, name
        assert ids[-1] == tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        if bos is not None and bos != tokenizer.eos_token_id:
            assert ids.count(bos) == (1 if kind == "llama" else 0)


def test_generation_blocks_and_prefixes_agree(tokenizers):
    tokenizer = tokenizers["neox", True]
    row = Row(0, "a", *[text for _, text in LONG[-2:]], "", tuple(LONG[:-2]))
    masks = tokenizer.apply_chat_template(
        as_messages(LONG), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    encoder = Encoder(tokenizer, 400, train_on="all")
    by_blocks = encoder.rows([row])[0]
    assert by_blocks.input_ids == masks["input_ids"]
    learned = [*by_blocks.earlier, *range(by_blocks.response_start, len(by_blocks.input_ids))]
    assert learned == [i for i, m in enumerate(masks["assistant_masks"]) if m]
    encoder._blocks = False
    assert encoder.rows([row])[0] == by_blocks


def test_a_template_that_cannot_be_masked_is_refused_with_the_remedy(tokenizers):
    broken = {
        "no prefix": "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
        "no answer": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}x",
        "syntax": "{% for m in messages %}",
        "raises": "{{ raise_exception('never') }}",
        "other": "{% for m in messages %}{{ m.role }}{% generation %}{% endgeneration %}{% endfor %}",
    }
    for template in broken.values():
        tokenizer = tokenizer_of("neox", False)
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=r"chat template of 'made/neox'.*generation"):
            Encoder(tokenizer, 100)


def test_rows_that_a_template_does_not_take_are_named_alone(tokenizers):
    tokenizer = tokenizer_of("llama", False)
    tokenizer.chat_template = LLAMA.replace(
        "{% for message",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for message",
        1,
    )
    rows = [Row(0, "a", "q", "r", ""), Row(1, "b", "q", "r", "", (("system", "s"),)), Row(2, "c", "q2", "r2", "")]
    encoded = Encoder(tokenizer, 100).rows(rows)
    assert "no system" in str(encoded[1])
    assert [isinstance(e, ValueError) for e in encoded] == [False, True, False]
    assert encoded[2] == Encoder(tokenizer, 100).rows(rows[2:])[0]


def test_an_earlier_turn_that_changes_is_refused_only_where_it_is_learned(tokenizers):
    tokenizer = tokenizer_of("qwen3", True)
    tokenizer.chat_template = QWEN.replace("message.content.strip()", "(message.content if loop.last else 'gone')", 1)
    row = Row(0, "a", "q2", "r2", "", (("user", "q"), ("assistant", "r")))
    tokenizer.chat_template = QWEN.replace(
        "{{- message.content.strip() +", "{{- (message.content if loop.index0 != 1 or loop.last else 'cut') +"
    )
    assert "train_on: last" in str(Encoder(tokenizer, 100, train_on="all").rows([row])[0])
    assert not isinstance(Encoder(tokenizer, 100).rows([row])[0], ValueError)


@pytest.mark.parametrize("kind", KINDS)
def test_left_truncation_keeps_the_response_and_bos(tokenizers, kind):
    tokenizer = tokenizers[kind, True]
    row = Row(0, "a", *[text for _, text in LONG[-2:]], "", tuple(LONG[:-2]))
    whole = Encoder(tokenizer, 400, train_on="all").rows([row])[0]
    response = whole.input_ids[whole.response_start :]
    length = len(whole.input_ids) - 9
    cut = Encoder(tokenizer, length, "left", "all").rows([row])[0]
    head = 1 if whole.input_ids[0] == tokenizer.bos_token_id else 0
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:head] + whole.input_ids[head + 9 :]
    assert cut.input_ids[cut.response_start :] == response
    assert [cut.input_ids[i] for i in cut.earlier] == [whole.input_ids[i] for i in whole.earlier if i >= head + 9]
    tiny = Encoder(tokenizer, 3, "left").rows([row])[0]
    assert (tiny.response_start, tiny.input_ids[1:], tiny.truncated) == (1, response[:2], True)
    assert "no response token fits" in str(Encoder(tokenizer, 3).rows([row])[0])
    right = Encoder(tokenizer, len(whole.input_ids) - 1).rows([row])[0]
    assert (right.input_ids, right.truncated) == (whole.input_ids[:-1], True)


def test_earlier_turns_are_predicted_in_the_batch():
    batch = collate(
        [Example(0, 0, [10, 11, 12, 13, 14, 15], 4, earlier=[2]), Example(1, 0, [20, 21], 1)], 2, call_cost=1
    )
    flat = batch.input_ids_ST.flatten()
    assert batch.target_K.tolist() == [21, 12, 14, 15]
    assert flat[batch.position_K].tolist() == [20, 11, 13, 14]
    assert batch.length_B.tolist() == [3, 1]
    assert sum(part.predicted for part in batch.parts) == 4
    assert batch.scale_K.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_table_keeps_what_was_encoded(tmp_path, tokenizers, num_proc):
    tokenizer = tokenizers["llama", True]
    records = [
        {"prompt": f"question {i}", "response": f"answer {i}", "source": "s" if i % 2 else ""} for i in range(2500)
    ]
    records[3]["prompt"] = "<|eot_id|>"
    records[7] = records[5]
    source = Source(write_jsonl(tmp_path / "p.jsonl", records))
    rows, problems = write_rows(source, tmp_path / "rows.arrow")
    assert problems == [f"{tmp_path}/p.jsonl, line 8: the same prompt and response as on {tmp_path}/p.jsonl, line 6"]
    encoder = Encoder(tokenizer, 60)
    table = encode_rows(rows, encoder, tmp_path / "tokens.arrow", num_proc)
    assert len(table.cache_files) == num_proc
    lost = [(row, problem) for row, problem in enumerate(table["problem"]) if problem]
    assert [row for row, _ in lost] == [3]
    assert "'<|eot_id|>'" in lost[0][1]
    assert column(table, "row").to_pylist() == [i for i in range(2500) if i != 7]
    example = Examples(table, {"": 0, "s": 1})([1500])[0]
    expected = encoder.rows([Row(1501, "1501", "question 1501", "answer 1501", "s")])[0]
    assert (example.input_ids, example.response_start, example.source) == (
        expected.input_ids,
        expected.response_start,
        1,
    )
    assert "\x1b[2m" in show_row(tokenizer, table)
    assert show_row(tokenizer, table).endswith("answer 0<|eot_id|>")
    question = "<|begin|><|start_header_id|>user<|end_header_id|>\n\nquestion 0<|eot_id|>"
    head = f"[{question}<|start_header_id|>assistant<|end_header_id|>\n\n]"
    assert show_row(tokenizer, table, "[]") == head + "answer 0<|eot_id|>"

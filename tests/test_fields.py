"""Fields that change what a row means: honoured, or refused by name; templates that say something else than the row."""

from __future__ import annotations

import json

import pytest
from support.files import SHARED, write_jsonl
from support.sources import Source
from support.templates import (
    BLOCKS,
    CUT,
    DATED,
    DEAF,
    FORGETS,
    PLAIN,
    RICH,
    SAME,
    STRICT,
    STRINGS,
    learned,
    tokenizer_with,
)

from lit_bilevel.data.encode import Encoded, Encoder
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.data.table import encode_rows, write_rows


def turns(*texts: str, **last) -> list[dict]:
    """User and assistant in turn; `last` are further fields of the last one."""
    made = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    made[-1] |= last
    return made


@pytest.fixture
def said(tmp_path):
    """What is learned of a record under a template, or why it is refused."""

    def make(record: dict, template: str | None = PLAIN, train_on: str = "last") -> list[str] | str:
        (tmp_path / "rows.arrow").unlink(missing_ok=True)
        tokenizer = tokenizer_with(template)
        source = Source(write_jsonl(tmp_path / "p.jsonl", [record]))
        rows, problems = write_rows(source, tmp_path / "rows.arrow")
        if problems:
            return problems[0]
        table = encode_rows(rows, Encoder(tokenizer, 400, train_on=train_on), tmp_path / "tokens.arrow")
        record = table[0]
        make.notice, make.text = record["notice"], tokenizer.decode(record["input_ids"] or [])
        make.row, make.unread = record, source.unread
        if record["problem"]:
            return record["problem"]
        names = ("input_ids", "response_start", "truncated", "earlier")
        return learned(tokenizer, Encoded(*(record[name] for name in names)))

    return make


# ---- answers that are not to be learned ----

SPAIN = ("capital of Spain?", "Lisbon", "sure?", "Madrid")
FLAGS = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": 0}, {"trainable": False}]


@pytest.mark.parametrize("template", [None, *SAME.values()])
@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: repr(flag))
def test_a_turn_that_is_not_to_be_learned_is_seen_and_not_learned(said, template, flag):
    messages = turns(*SPAIN)
    messages[1] |= flag
    assert said({"messages": messages}, template) == ["Madrid<eos>"]
    assert said({"messages": messages}, template, "all") == ["Madrid<eos>"]
    assert "Lisbon" in said.text
    messages[1], messages[3] = {"role": "assistant", "content": "Lisbon"}, messages[3] | flag
    assert "its last answer is not to be learned" in said({"messages": messages}, template)
    assert said({"messages": messages}, template, "all") == ["Lisbon<eos>"]
    assert (said.row["prompt"], said.row["response"]) == ("capital of Spain?", "Lisbon")
    messages[1] |= flag
    assert "line 1: none of its answers is to be learned" in said({"messages": messages}, template, "all")


def test_flags_of_other_formats_and_values(said):
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in turns(*SPAIN)]
    shared[1]["weight"] = 0
    assert said({"conversations": shared}, PLAIN, "all") == ["Madrid<eos>"]
    split = {"prompt": turns(*SPAIN)[:3], "completion": turns(*SPAIN)[3:]}
    split["prompt"][1]["train"] = False
    assert said(split, PLAIN, "all") == ["Madrid<eos>"]
    assert said({"messages": turns(*SPAIN, weight=1, train=True, loss=None)}) == ["Madrid<eos>"]
    for flag in ({"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"loss": [0]}):
        assert "turn 2: the field" in said({"messages": turns("q", "a", **flag)})
    asked = turns("q", "a")
    asked[0]["train"] = True
    assert "turn 1: the field `train` asks to learn a turn of the role 'user'" in said({"messages": asked})
    asked[0] = {"role": "user", "content": "q", "weight": 1, "train": False}
    assert said({"messages": asked}) == ["a<eos>"]


# ---- answers that are bad ones ----


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_an_answer_that_is_labelled_a_bad_one_is_refused(said, name):
    for record in (
        {"prompt": "q", "completion": "a"},
        {"messages": turns("q", "a")},
        {"instruction": "q", "output": "a"},
    ):
        assert f"line 1: the field `{name}` is false" in said(record | {name: False})
        assert f"line 1: the field `{name}` is false" in said(record | {name: "False"})
        assert said(record | {name: True}) == ["a<eos>"]
        assert said(record | {name: "sports"}) == ["a<eos>"]
    assert said({"text": "a", name: False}, None)  # a label of plain text says nothing of its worth


# ---- reasoning ----


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_goes_where_the_template_puts_it_or_its_absence_is_told(said, name):
    record = {"messages": turns("2+3?", "5", **{name: "two and three"})}
    assert said(record, RICH) == ["<think>two and three</think>5<eos>"]
    assert said.notice is None
    for template in (PLAIN, BLOCKS, None):
        assert said(record, template) == ["5<eos>"]
        assert "reasoning" in said.notice
    assert "its reasoning is list" in said({"messages": turns("2+3?", "5", **{name: [1]})})


# ---- tools ----

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLED = [
    {"role": "user", "content": "weather in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "12"},
    {"role": "assistant", "content": "12 degrees"},
]


@pytest.mark.parametrize("template", [RICH, STRINGS], ids=["objects", "strings"])
def test_tools_and_calls_are_handed_to_a_template_that_takes_them(said, template):
    text = '[call]weather{"city": "Oslo"}<eos>'
    assert said({"messages": CALLED}, template) == ["12 degrees<eos>"]
    assert said({"messages": CALLED}, template, "all") == [text, "12 degrees<eos>"]
    assert "[tool]12<eos>" in said.text
    assert said({"messages": CALLED[:2], "tools": TOOLS}, template) == [text]
    assert said.text.startswith('[tools][{"type": "function"')
    strings = json.loads(json.dumps(CALLED[:2]))
    strings[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo"}'
    assert said({"messages": strings, "tools": json.dumps(TOOLS)}, template) == [text]
    older = [CALLED[0], {"role": "assistant", "content": "Let me look.", "function_call": CALL["function"]}]
    assert said({"messages": older, "functions": [TOOLS[0]["function"]]}, template) == [f"Let me look.{text}"]
    assert said.text.startswith("[tools]")


@pytest.mark.parametrize("template", [PLAIN, BLOCKS, None], ids=["plain", "blocks", "none"])
def test_tools_are_refused_where_the_template_has_no_place_for_them(said, template):
    for record, name in (
        ({"messages": turns("weather in Oslo?", "fine"), "tools": TOOLS}, "tools"),
        ({"prompt": "weather in Oslo?", "response": "fine", "tools": TOOLS}, "tools"),
        ({"messages": CALLED}, "tool_calls"),
        (
            {"messages": [*turns("q"), {"role": "assistant", "content": "x", "function_call": {"name": "w"}}]},
            "tool_calls",
        ),
    ):
        assert f"`{name}`" in said(record, template)
        assert "line 1" in said(record, template)
    for nothing in (None, [], "", "[]", {}):
        assert said({"messages": turns("q", "a", tool_calls=[]), "tools": nothing}, template) == ["a<eos>"]


def test_tools_that_are_none_are_refused_by_name(said):
    for record, message in (
        ({"messages": turns("q", "a"), "tools": "{"}, "the field `tools` is a string that is not JSON"),
        ({"messages": turns("q", "a"), "tools": {"a": 1}}, "the field `tools` is not a list of tools"),
        ({"messages": turns("q", "a", tool_calls=[1])}, "`tool_calls` is not a list of calls"),
        ({"messages": turns("q", "a", tool_calls=[{"id": "1"}])}, "a call without the name of a function"),
        (
            {"messages": turns("q", "a", tool_calls=[{"function": {"name": "w", "arguments": "{"}}])},
            "arguments that are not JSON",
        ),
        ({"chosen": turns("q", "a", tool_calls=[CALL]), "rejected": turns("q", "b")}, "that are compared are not read"),
    ):
        assert message in said(record, RICH)


# ---- what is not read ----


@pytest.mark.parametrize("name", ["images", "image", "videos", "audio", "chat_template_kwargs"])
def test_pictures_and_sounds_are_refused_by_line_and_field(said, name):
    for record in ({"messages": turns("q", "a")}, {"prompt": "q", "response": "a"}, {"text": "a"}):
        assert f"line 1: the field `{name}` is not read" in said(record | {name: ["a.png"]})
        assert said(record | {name: []}) == ["a<eos>"] or record == {"text": "a"}
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "this?"}]
    assert said({"messages": [{"role": "user", "content": parts}, turns("q", "a")[1]]}) == ["a<eos>"]
    assert "[user]what is this?<eos>" in said.text
    parts.append({"type": "image"})
    assert "part of the type 'image'" in said({"messages": [{"role": "user", "content": parts}, turns("q", "a")[1]]})


@pytest.mark.parametrize("name", ["prefix", "partial", "train_detail", "images"])
def test_fields_of_a_turn_that_are_not_read_are_refused(said, name):
    assert f"turn 2: the field `{name}` is not read" in said({"messages": turns("q", "a", **{name: [1]})})


def test_a_system_prompt_beside_the_turns_is_read_wherever_there_are_turns(said):
    for record in (
        {"messages": turns("q", "a")},
        {"prompt": turns("q", "a")[:1], "completion": turns("q", "a")[1:]},
        {"chosen": turns("q", "a"), "rejected": turns("q", "b")},
        {"prompt": turns("q", "a")[:1], "chosen": turns("q", "a")[1:], "rejected": turns("q", "b")[1:]},
    ):
        assert said(record | {"system": "be kind"}) == ["a<eos>"]
        assert said.text.startswith("[system]be kind<eos>")
    own = [{"role": "system", "content": "be cruel"}, *turns("q", "a")]
    assert "begins with a system turn too" in said({"messages": own, "system": "be kind"})


def test_metadata_is_named_once(tmp_path, caplog, said):
    assert said({"messages": turns("q", "a", mood="good"), "difficulty": 3, "id": 1, "source": "s"}) == ["a<eos>"]
    assert said.unread == {"mood", "difficulty"}
    rows = [{"prompt": f"{i}", "response": "r", "lang": "en"} for i in range(12)]
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [r | {"prompt": n + r["prompt"]} for r in rows]) for n in "pv"]
    caplog.set_level("INFO")
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        data = BilevelDataModule(*paths, cache=str(tmp_path / "cache"))
        data._load_tokenizer = lambda: tokenizer_with(None)
        data.setup()
        assert caplog.text.count("pool: fields that are not read: lang") == 1


# ---- templates that rewrite ----


def test_a_template_that_rewrites_an_answer_is_told_and_one_that_removes_it_refused(said):
    record = {"prompt": "2+3?", "response": "<think>two and three</think>5"}
    assert said(record, CUT) == ["5<eos>"]
    assert "the chat template rewrites the answer: '5' is learned of '<think>two and three</think>5'" in said.notice
    assert said({"prompt": "2+4?", "response": "6"}, CUT) == ["6<eos>"]
    assert said.notice is None
    assert "leaves nothing of its answer" in said({"prompt": "2+5?", "response": "<think>only</think>"}, CUT)
    lower = PLAIN.replace("m.content +", "m.content | lower +")
    assert said({"prompt": "Q", "response": "An Answer"}, lower) == ["an answer<eos>"]
    assert "rewrites the answer" in said.notice
    blocks = BLOCKS.replace("{{ m.content + eos_token }}{% endg", "{{ m.content[:4] + eos_token }}{% endg")
    assert said({"prompt": "q", "response": "fourteen"}, blocks) == ["four<eos>"]
    assert "'four' is learned of 'fourteen'" in said.notice
    spaced = PLAIN.replace("m.content +", "'  ' + m.content | trim + '\n' +")
    assert said({"prompt": "q", "response": "a  b "}, spaced)
    assert said.notice is None  # white space is no difference


def test_a_template_that_leaves_out_a_turn_that_is_not_learned_is_told(said):
    messages = [{"role": "system", "content": "be kind"}, *turns("q", "a")]
    assert said({"messages": messages}, DEAF) == ["a<eos>"]
    assert "leaves out or rewrites a turn of the role `system`" in said.notice
    past = {"messages": turns("q", "<think>hm</think>a", "r", "<think>so</think>b")}
    assert said(past, FORGETS) == ["<think>so</think>b<eos>"]
    assert said.notice is None  # that is what the template is for
    assert "rendered in another way when more turns follow" in said(past, FORGETS, "all")


def test_differences_are_counted_and_the_first_is_named(tmp_path):
    rows = [{"prompt": f"{i}", "response": f"<think>{i}</think>five"} for i in range(12)]
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [r | {"prompt": n + r["prompt"]} for r in rows]) for n in "pv"]
    data = BilevelDataModule(*paths, cache=False)
    data._load_tokenizer = lambda: tokenizer_with(CUT)
    with pytest.warns(UserWarning, match="of 12 rows") as caught:
        data.setup()
    assert len(caught) == 2
    text = str(caught[0].message)
    assert "pool: the chat template rewrites the answer of 12 rows" in text
    assert "p.jsonl, line 1: 'five' is learned of '<think>0</think>five'" in text
    assert "`reasoning_content`" in text


# ---- conversations that begin with the assistant ----


@pytest.mark.parametrize("template", [None, *SAME.values(), DATED], ids=["none", *SAME, "dated"])
@pytest.mark.parametrize("system", [False, True])
def test_a_conversation_that_begins_with_the_assistant_is_learned(said, template, system):
    messages = [{"role": "assistant", "content": "Hello, how can I help?"}, *turns("q0", "a0")]
    if system:
        messages.insert(0, {"role": "system", "content": "be kind"})
    assert said({"messages": messages}, template) == ["a0<eos>"]
    first = "Hello, how can I help?<eos>"
    if template is None and not system:
        first = first[1:]  # there is no token before the first one to predict it from
    assert said({"messages": messages}, template, "all") == [first, "a0<eos>"]


def test_a_template_that_forbids_such_a_beginning_is_quoted(said):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('must begin with user') }}{% endif %}" + PLAIN
    messages = [{"role": "assistant", "content": "Hello"}, *turns("q0", "a0")]
    assert "the chat template does not take it: must begin with user" in said({"messages": messages}, strict)


# ---- the day ----


def test_the_clock_stands_still_while_rows_are_encoded(tmp_path):
    encoder = Encoder(tokenizer_with(DATED), 400, train_on="all")
    rows = [Source(write_jsonl(tmp_path / "p.jsonl", [{"messages": turns(*SPAIN)}])).rows()[0]] * 50
    assert len({tuple(encoded.input_ids) for encoded in encoder.rows(rows)}) == 1
    assert Encoder(tokenizer_with(DATED), 400).rows(rows[:1]) != encoder.rows(rows[:1])


# ---- the files that showed it ----


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="../shared/cases is absent")
def test_the_files_of_the_reports(said):
    cases = SHARED / "cases"

    def each(name: str, *settings) -> list:
        return [said(json.loads(line), *settings) for line in (cases / name).read_text().splitlines()]

    weight = [["Madrid<eos>"], ["Rome<eos>"]]
    *found, last = each("j_weight.jsonl")
    assert found == weight
    assert "line 1: its last answer is not to be learned" in last.replace(", id '0'", "")
    assert each("j_weight.jsonl", PLAIN, "all") == [*weight, ["Lima<eos>"]]
    assert each("j_reason.jsonl", RICH)[0] == ["<think>two plus three makes five</think>5<eos>"]
    assert each("j_reason.jsonl", RICH)[1] == ["<think>two plus four makes six</think>6<eos>"]
    assert each("j_reason.jsonl") == [["5<eos>"], ["6<eos>"]]
    assert "leaves out the reasoning" in said.notice
    plain, rich = each("j_tools.jsonl"), each("j_tools.jsonl", RICH)
    assert rich[0] == ["Let me look.[call]weather{}<eos>"]
    assert rich[1] == ["12 degrees<eos>"]
    assert "the field `tools`" in plain[0]
    assert "the field `tool_calls`" in plain[1]
    assert rich[2:] == plain[2:]
    assert "turn 2 of `messages`: the field `content` is empty" in plain[2]
    assert "must end with a user turn and an assistant turn" in plain[3]
    assert plain[4] == ["b<eos>"]
    assert plain[5] == ["c<eos>"]
    assert "must end with a user turn" in plain[6]
    assert plain[7] == ["ok<eos>"]
    assert "the role 'developer' is not one of" in plain[8]
    think = each("p_think.jsonl", CUT)
    assert think[:2] == [["5<eos>"], ["6<eos>"]]
    assert "leaves nothing of its answer" in think[2]
    for number, found in enumerate(each("j_first.jsonl", STRICT, "all")):
        assert found == ["Hello, how can I help?<eos>", f"a{number}<eos>"]

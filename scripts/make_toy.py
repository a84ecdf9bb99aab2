"""Make the embedded default in `lit_bilevel/toy`: toy tasks with an unclean pool, and a tiny policy for them.

Writes `pool.jsonl`, `validation.jsonl`, `test.jsonl` (rows `id, prompt, response, source`; the three sets share no
prompt), `truth.jsonl` (rows `id, corrupted, kind` of the pool, for scoring only) and `model/`, a Llama of about 0.3M
parameters with a byte tokenizer in which each instruction is one token. The same arguments give the same files.

A share of the pool is corrupted, in four ways:

    mismatched   the answer of another row of the same task
    random       characters of the right kinds (small, capital, digit), drawn at random, the length within one
    repetitive   the first one or two characters of the right answer, over and over
    truncated    the right answer, cut to half of its length or less, two characters or more where half is that long

One number read off the response finds one kind at most: its length has AUROC 0.87 for truncated rows, its share of
distinct characters 0.93 for repetitive ones, and either has less than 0.6 over all kinds. Right answers are as short
as two characters (cut to one they are the only responses of one character), and those of `repeat` are repetitive.
The policy is trained on the pieces of the tasks (a word and its copy, its capitals, its reverse …; sums; counting)
in a random order, with no instruction: it can do most of the work, and does not know which word asks for what.

Left out: natural language (see the recipe configs), a chat template, near-duplicates and any noise in the validation
and test sets.

    python scripts/make_toy.py
    python scripts/make_toy.py --no_model --output /tmp/mix --seed 7 --corrupted 0.4 --kinds mismatched=2 truncated=1
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijkl"
NEXT = dict(zip(LETTERS, LETTERS[1:] + LETTERS[:1], strict=True))
KINDS = ("mismatched", "random", "repetitive", "truncated")
EOS, PAD = "<eos>", "<pad>"

Pair = tuple[str, str]  # prompt, right answer


def word(rng: random.Random, shortest: int, longest: int) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(shortest, longest)))


def on_word(answer: Callable[[str], str]) -> Callable[[random.Random], Pair]:
    def draw(rng: random.Random) -> Pair:
        text = word(rng, 2, 7)
        return text, answer(text)

    return draw


def repeat(rng: random.Random) -> Pair:
    text, times = word(rng, 2, 4), rng.randint(2, 3)
    return f"{text}*{times}", text * times


def add(rng: random.Random) -> Pair:
    left, right = rng.randint(10, 199), rng.randint(1, 9)
    return f"{left}+{right}", str(left + right)


TASKS: dict[str, Callable[[random.Random], Pair]] = {
    "reverse": on_word(lambda text: text[::-1]),
    "sort": on_word(lambda text: "".join(sorted(text))),
    "upper": on_word(str.upper),
    "next": on_word(lambda text: "".join(NEXT[letter] for letter in text)),
    "repeat": repeat,
    "add": add,
}


def draw_rows(rng: random.Random, count: int) -> list[dict[str, str]]:
    """`count` right rows, the tasks taking turns, no prompt twice."""
    rows, seen, tasks = [], set(), list(TASKS)
    for index in range(count):
        task = tasks[index % len(tasks)]
        for _ in range(1000):
            question, answer = TASKS[task](rng)
            prompt = f"{task}: {question}"
            if prompt not in seen:
                break
        else:
            raise ValueError(f"Task `{task}` has run out of new prompts after {index} rows: ask for fewer rows.")
        seen.add(prompt)
        rows.append({"prompt": prompt, "response": answer, "source": task})
    rng.shuffle(rows)
    return rows


def similar_noise(rng: random.Random, answer: str) -> str:
    alphabets = [LETTERS, LETTERS.upper(), "0123456789"]
    alphabet = next(alphabet for alphabet in alphabets if answer[0] in alphabet)
    return "".join(rng.choices(alphabet, k=max(2, len(answer) + rng.randint(-1, 1))))


def corrupt(rng: random.Random, kind: str, row: dict[str, str], rows: list[dict[str, str]]) -> str:
    """A wrong response to `row`, never equal to the right one."""
    answer = row["response"]
    peers = [other["response"] for other in rows if other["source"] == row["source"]]
    for _ in range(1000):
        if kind == "mismatched":
            wrong = rng.choice(peers)
        elif kind == "random":
            wrong = similar_noise(rng, answer)
        elif kind == "repetitive":
            wrong = (answer[: rng.randint(1, 2)] * 12)[: max(3, len(answer) + rng.randint(-1, 2))]
        else:
            half = (len(answer) + 1) // 2
            wrong = answer[: rng.randint(min(2, half), half)]
        if wrong != answer:
            return wrong
    raise ValueError(f"No wrong response of kind `{kind}` was found for the prompt {row['prompt']!r}.")


def make_data(args: argparse.Namespace) -> dict[str, list[dict]]:
    rng = random.Random(args.seed)
    rows = draw_rows(rng, args.pool + args.validation + args.test)
    pool, held_out = rows[: args.pool], rows[args.pool :]
    kinds = rng.choices(list(args.kinds), weights=list(args.kinds.values()), k=round(args.corrupted * args.pool))
    kinds += ["clean"] * (args.pool - len(kinds))
    rng.shuffle(kinds)
    responses = [
        row["response"] if kind == "clean" else corrupt(rng, kind, row, pool)
        for row, kind in zip(pool, kinds, strict=True)
    ]
    unclean = [row | {"response": response} for row, response in zip(pool, responses, strict=True)]
    sets = {"pool": unclean, "validation": held_out[: args.validation], "test": held_out[args.validation :]}
    data = {name: [{"id": f"{name}-{i:05d}"} | row for i, row in enumerate(rows)] for name, rows in sets.items()}
    data["truth"] = [
        {"id": row["id"], "corrupted": kind != "clean", "kind": kind}
        for row, kind in zip(data["pool"], kinds, strict=True)
    ]
    return data


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, without merges, so that a prompt and its response can be encoded apart; an instruction is one token."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, PAD])
    tokenizer.add_tokens([AddedToken(f"{task}: ", normalized=False) for task in TASKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def related_text(rng: random.Random) -> str:
    """One line of what the policy is trained on before anyone fine-tunes it."""
    text, start, number = word(rng, 3, 7), rng.randrange(len(LETTERS)), rng.randint(10, 199)
    run = (LETTERS * 2)[start : start + rng.randint(4, 10)]
    digit, gap = rng.randint(1, 9), rng.choice(" =\n")
    shifted = "".join(NEXT[letter] for letter in text)
    return rng.choice(
        [
            text + gap + text,
            text[:4] + gap + text[:4] * 2,
            text + gap + text.upper(),
            text + gap + text[::-1],
            text + gap + shifted,
            text + gap + "".join(sorted(text)),
            run + gap + run.upper(),
            f"{number}+{digit}{gap}{number + digit}",
            gap.join(str(number + i) for i in range(4)),
        ]
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = random.Random(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=88,
        intermediate_size=232,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = tokenizer([related_text(rng) + EOS for _ in range(64)], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def kind_shares(pairs: Iterable[str]) -> dict[str, float]:
    """`["random=2", "truncated=1"]` → `{"random": 2.0, "truncated": 1.0}`."""
    shares = {}
    for pair in pairs:
        kind, _, share = pair.partition("=")
        if kind not in KINDS:
            raise ValueError(f"`--kinds` got the kind {kind!r}; accepted are {', '.join(KINDS)}, as in `random=1`.")
        shares[kind] = float(share or 1)
    return shares


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "lit_bilevel" / "toy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=4000, help="rows of the unclean pool")
    parser.add_argument("--validation", type=int, default=500, help="trusted rows")
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--corrupted", type=float, default=0.5, help="share of the pool that gets a wrong response")
    parser.add_argument("--kinds", nargs="+", default=[f"{kind}=1" for kind in KINDS], help="relative shares")
    parser.add_argument("--pretrain_steps", type=int, default=2500)
    parser.add_argument("--no_model", action="store_true", help="write the data only")
    args = parser.parse_args()
    args.kinds = kind_shares(args.kinds)
    return args


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in make_data(args).items():
        (args.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if not args.no_model:
        tokenizer = make_tokenizer()
        make_model(tokenizer, args.seed, args.pretrain_steps).save_pretrained(args.output / "model")
        tokenizer.save_pretrained(args.output / "model")


if __name__ == "__main__":
    main()

"""Ratios of recorded responses under a saved policy, from the files alone: `recompute_ratios.py POLICY RESPONSES POOL`.

Knows nothing of this project: transformers, the saved policy, `responses.jsonl` and the pool. Prints a JSON list of
exp(logp now − logp recorded), one per generated token, responses in the order of the file.
"""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def records(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@torch.no_grad()
def ratios(policy: str, responses: str, pool: str) -> list[float]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    prompts, found = {row["id"]: row["prompt"] for row in records(pool)}, []
    for response in records(responses):
        if not response["finished"] or len(response["token_ids"]) < 2:
            continue
        prompt = tokenizer(prompts[response["id"]] + "\n").input_ids  # how plain rows are rendered
        logits = model(torch.tensor([prompt + response["token_ids"]])).logits[0] / response["temperature"]
        now = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        recorded = zip(response["token_ids"], response["token_logprobs"], strict=True)
        found += [math.exp(now[t, token].item() - before) for t, (token, before) in enumerate(recorded)]
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(ratios(*sys.argv[1:])))

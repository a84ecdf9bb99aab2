"""The scoring pass: every number against a plain forward pass of each row alone, parts, processes, density ratios."""

from __future__ import annotations

import functools
import itertools
import math
import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from support import ranks
from support.files import ROOT, TOY, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_bilevel.__main__ import main
from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.policy.load import PolicySettings, load_policy
from lit_bilevel.scores import density, parts
from lit_bilevel.scores.columns import COLUMNS, DIRECTION, FEATURES
from lit_bilevel.scores.measure import compress
from lit_bilevel.scores.opening import opening_of
from lit_bilevel.scores.parts import PartFiles, plan
from lit_bilevel.scores.sweep import score_rows
from lit_bilevel.scores.table import Scores, columns_of, read_scores, weights_from_score, write_scores

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    ranks.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    ranks.save_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(model: Path, small: dict[str, str], **settings) -> BilevelDataModule:
    data = BilevelDataModule(small["pool"], small["validation"], tokenizer=str(model), cache=False, **settings)
    data.setup()
    return data


def policy_of(model: Path):
    return load_policy(PolicySettings(str(model), dtype="float64"), torch.float64)


@functools.cache
def loaded(model: Path):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()


def plainly(model: Path, tokenizer, opening: list[int], example, text: str) -> dict[str, float]:
    """Every number of a row from transformers, `F.cross_entropy` and `Categorical` alone."""
    lm = loaded(model)

    def losses(before: list[int], response: list[int]):
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([before + response])).logits[0, len(before) - 1 : -1]
        nll = F.cross_entropy(logits, torch.tensor(response), reduction="none")
        return nll, torch.distributions.Categorical(logits=logits).entropy()

    start = example["response_start"]
    prompt, response = example["input_ids"][:start], example["input_ids"][start:]
    nll, entropy = losses(prompt, response)
    alone, _ = losses(opening, response)
    ended = response[-1] == tokenizer.eos_token_id
    return {
        "loss": float(nll.mean()),
        "loss_without_prompt": float(alone.mean()),
        "pmi": float(alone.mean() - nll.mean()),
        "ifd": float(nll.mean() / alone.mean()),
        "end_loss": float(nll[-1]) if ended else math.nan,
        "entropy": float(entropy.mean()),
        "length": len(response),
        "compressed": len(zlib.compress(text.encode(), 9)) / len(text.encode()),
        "loss_before_end": float(nll[:-1].mean() if ended else nll.mean()),
        "loss_before_end_without_prompt": float(alone[:-1].mean() if ended else alone.mean()),
        "first_loss": float(nll[:3].mean()),
        "largest_loss": float(nll.max()),
        "prompt_length": len(prompt),
    }


@pytest.mark.parametrize("templated", [False, True])
def test_every_number_is_that_of_a_plain_pass(model, chat_model, small, templated):
    folder = chat_model if templated else model
    data, tokenizer = rows_of(folder, small, max_length=32 if templated else 18), AutoTokenizer.from_pretrained(folder)
    opening = opening_of(tokenizer)
    assert tokenizer.decode(opening).endswith("assistant " if templated else tokenizer.bos_token or tokenizer.eos_token)
    found = score_rows(policy_of(folder), tokenizer, data.sets["pool"], data.sets["upper"], batch_size=7)
    assert list(found)[: len(COLUMNS)] == list(COLUMNS)
    assert np.isnan(found["end_loss"]).any()  # some are cut
    for row in range(0, 90, 9):
        example = data.sets["pool"][row]
        for name, value in plainly(folder, tokenizer, opening, example, example["response"]).items():
            assert found[name][row] == pytest.approx(value, rel=2e-6, abs=2e-6, nan_ok=True), (row, name)


def test_a_row_is_scored_alike_in_any_batch(model, small):
    data, tokenizer = rows_of(model, small), AutoTokenizer.from_pretrained(model)
    found = [
        score_rows(policy_of(model), tokenizer, data.sets["pool"], None, batch_size, call_cost)
        for batch_size, call_cost in ((1, math.inf), (5, math.inf), (64, 8.0))
    ]
    for name in FEATURES:
        for other in found[1:]:
            np.testing.assert_allclose(found[0][name], other[name], rtol=1e-6, err_msg=name)
    assert np.isnan(found[0]["density_ratio"]).all()  # nothing to compare with


def test_all_turns_or_the_last_are_learned_and_the_last_is_scored(model, tmp_path):
    turns = [("user", "add: 1+1"), ("assistant", "10"), ("user", "copy: abc"), ("assistant", "abc")]
    messages = {"messages": [{"role": role, "content": text} for role, text in turns]}
    other = [{"prompt": f"copy: {'a' * n}", "response": "a" * n} for n in range(1, 5)]
    small = {
        "pool": write_jsonl(tmp_path / "pool.jsonl", [messages]),
        "validation": write_jsonl(tmp_path / "validation.jsonl", other),
    }
    tokenizer = AutoTokenizer.from_pretrained(model)
    last, every = (
        score_rows(policy_of(model), tokenizer, rows_of(model, small, train_on=which).sets["pool"])
        for which in ("last", "all")
    )
    assert last["length"].tolist() == [4]
    for name in FEATURES:
        np.testing.assert_array_equal(last[name], every[name], err_msg=name)


def test_plain_text_has_no_prompt_to_take_away(model, tmp_path):
    texts = [{"text": row["prompt"] + row["response"]} for row in read_jsonl(TOY / "pool.jsonl")[:40]]
    small = {
        "pool": write_jsonl(tmp_path / "pool.jsonl", texts[:20]),
        "validation": write_jsonl(tmp_path / "validation.jsonl", texts[20:]),
    }
    data = rows_of(model, small)
    found = score_rows(policy_of(model), AutoTokenizer.from_pretrained(model), data.sets["pool"], data.sets["upper"])
    for name in ("loss_without_prompt", "pmi", "ifd"):
        assert np.isnan(found[name]).all()
    assert found["density_ratio"].mean() == pytest.approx(1)
    assert np.isfinite(found["loss"]).all()
    with pytest.raises(ValueError, match="20 of 20 rows have no `ifd`, because they have no prompt"):
        Scores([], found).orient("ifd")


def test_the_opening_of_templates():
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    assert opening_of(tokenizer) == [tokenizer.bos_token_id or tokenizer.eos_token_id]
    tokenizer.chat_template = TEMPLATE
    opening = opening_of(tokenizer)
    assert tokenizer.decode(opening).endswith("\nassistant ")
    assert Encoder(tokenizer, 99).prompts(["x"])[0][-len(opening) + 1 :] == opening[1:]


def test_a_policy_in_training_is_left_as_it_is(model, small):
    data, policy = rows_of(model, small), policy_of(model)
    policy.train()
    before = [parameter.clone() for parameter in policy.parameters()]
    score_rows(policy, AutoTokenizer.from_pretrained(model), data.sets["upper"])
    assert policy.training
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))


def test_a_loss_that_is_not_finite_is_refused(model, small):
    data, policy = rows_of(model, small), policy_of(model)
    with torch.no_grad():
        next(policy.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="loss of 24 rows is not finite"):
        score_rows(policy, AutoTokenizer.from_pretrained(model), data.sets["upper"])


# ---- density ratios ----


def shifted(rows: int, trusted: int, shift: float = 0.8, scale: float = 0.7):
    """Pool and trusted rows of two Gaussians, of a third that is noise, and the log of their known ratio."""
    random = np.random.default_rng(0)
    pool, trusty = random.normal(size=(rows, 3)), random.normal(size=(trusted, 3))
    trusty[:, :2] = shift + scale * trusty[:, :2]
    z = (pool[:, :2] - shift) / scale
    return pool, trusty, (pool[:, :2] ** 2 / 2 - z**2 / 2 - np.log(scale)).sum(1)


def test_the_ratio_of_two_gaussians_is_found():
    pool, trusted, log_ratio = shifted(3000, 600)
    found = density.density_ratio(pool, trusted)
    assert found.mean() == pytest.approx(1)
    assert np.corrcoef(np.log(found), log_ratio)[0, 1] > 0.97
    truth = np.exp(log_ratio)
    assert np.abs(found - truth / truth.mean()).mean() < 0.25
    linear = density.density_ratio(np.abs(pool), np.abs(trusted))  # and folded, what squares alone cannot tell
    assert np.corrcoef(np.log(linear), log_ratio)[0, 1] < 0.9


def test_equal_rows_have_nearly_equal_weights():
    random = np.random.default_rng(1)
    found = density.density_ratio(random.normal(size=(640, 11)), random.normal(size=(128, 11)))
    assert found.std() < 0.35  # the penalty is chosen so that chance is not learned
    assert found.mean() == pytest.approx(1)


def test_no_row_is_scored_by_a_fit_that_saw_its_label():
    pool, trusted, _ = shifted(150, 50)
    features, label = np.concatenate([pool, trusted]), np.arange(200) >= 150
    before = density.cross_fit_log_odds(features, label)
    for row in (3, 170):
        flipped = label.copy()
        flipped[row] = not flipped[row]
        after = density.cross_fit_log_odds(features, flipped)
        assert after[row] == before[row]
        assert (after != before).any()


def test_a_missing_number_does_not_move_a_row_much():
    pool, trusted, _ = shifted(400, 100)
    missing = pool.copy()
    missing[::7, 2] = np.nan  # the noise
    whole, found = density.density_ratio(pool, trusted), density.density_ratio(missing, trusted)
    assert np.corrcoef(whole, found)[0, 1] > 0.9
    empty = np.full((400, 1), np.nan), np.full((100, 1), np.nan)
    found = density.density_ratio(np.hstack([pool, empty[0]]), np.hstack([trusted, empty[1]]))
    assert np.corrcoef(whole, found)[0, 1] > 0.98


def test_a_large_pool_is_fitted_on_a_part_and_scored_whole(monkeypatch):
    pool, trusted, log_ratio = shifted(4000, 300)
    monkeypatch.setattr(density, "FITTED", 600)
    found = density.density_ratio(pool, trusted)
    assert np.corrcoef(np.log(found), log_ratio)[0, 1] > 0.95
    assert found.mean() == pytest.approx(1)


def test_too_few_trusted_rows_are_told():
    with pytest.raises(ValueError, match="at least 10 trusted rows and there are 9"):
        density.density_ratio(np.zeros((50, 2)), np.ones((9, 2)))
    assert np.isnan(columns_of(np.ones((4, len(FEATURES)), np.float32), None)["density_ratio"]).all()


# ---- parts and the file ----


def test_a_plan_has_every_row_once_in_parts_of_like_length():
    lengths = {"pool": np.random.default_rng(0).integers(3, 90, 1000), "upper": np.arange(50)}
    found = plan(lengths)
    for name, length in lengths.items():
        own = [part for part in found if part.set == name]
        assert sorted(np.concatenate([part.rows for part in own]).tolist()) == list(range(len(length)))
        spans = [(length[part.rows].max(), length[part.rows].min()) for part in own]
        assert all(a[1] >= b[0] for a, b in itertools.pairwise(spans))
    assert [part.number for part in found] == list(range(len(found)))
    assert max(len(part.rows) for part in plan({"pool": np.ones(10**6)})) <= parts.MOST


def test_parts_are_kept_for_their_key_alone(tmp_path):
    folder = tmp_path / "out.parquet.parts"
    part = plan({"pool": np.arange(5)})[0]
    files = PartFiles(folder, {"rows": "a"})
    assert files.open() == 0
    files.write(part, np.arange(10, dtype=np.float32).reshape(5, 2))
    (folder / "00007.partial").write_bytes(b"half")
    assert PartFiles(folder, {"rows": "a"}).open() == 1
    assert not (folder / "00007.partial").exists()
    assert files.read([part], {"pool": 5})["pool"][part.rows[0]].tolist() == [0, 1]
    assert PartFiles(folder, {"rows": "b"}).open() == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="move it away"):
        PartFiles(tmp_path / "mine", {}).open()
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_file_of_scores_comes_back(tmp_path):
    columns = {"loss": np.array([1, 2], np.float32), "ifd": np.array([0.5, 2], np.float32)}
    write_scores(tmp_path / "s.parquet", ["a", "b"], columns, {"policy": "x"})
    found = read_scores(tmp_path / "s.parquet")
    assert found.ids == ["a", "b"]
    assert found.orient("ifd").tolist() == [-0.5, -2]
    with pytest.raises(ValueError, match="no score 'pmi'; there are: loss, ifd"):
        found.orient("pmi")
    with pytest.raises(ValueError, match="does not exist"):
        read_scores(tmp_path / "none.parquet")
    assert set(DIRECTION) == {*COLUMNS, "weight"}


def test_weights_from_scores_have_mean_1_and_keep_the_order():
    score = np.random.default_rng(0).normal(3, 2, 200)
    weights = weights_from_score("ifd", score)
    assert weights.mean() == pytest.approx(1)
    assert (weights.argsort() == score.argsort()).all()
    z = (score - score.mean()) / score.std()
    np.testing.assert_allclose(weights / weights[0], (1 + np.exp(-z[0])) / (1 + np.exp(-z)))
    ratio = np.abs(score)
    np.testing.assert_allclose(weights_from_score("density_ratio", ratio), ratio / ratio.mean())


def test_compressed_tells_repetition():
    assert compress("na " * 40) < 0.2 < compress("Paris is the capital of France.") < 1.5


# ---- the command ----


@pytest.fixture
def asked(small, tmp_path) -> list[str]:
    return [
        *("score", "--config=configs/quickstart.yaml", f"--output={tmp_path / 'scores.parquet'}"),
        *(f"--data.{name}={path}" for name, path in small.items()),
        *("--trainer.accelerator=cpu", "--data.eval_batch_size=8"),
    ]


def test_the_command_writes_the_columns_and_says_what_they_find(asked, tmp_path, small, capsys):
    assert main([*asked, "--model.policy.lora={r: 4, alpha: 4}"]) == 0
    output = capsys.readouterr()
    assert "AUROC" in output.out
    assert "density_ratio" in output.out
    table = pyarrow.parquet.read_table(tmp_path / "scores.parquet")
    assert table.column_names == ["id", *COLUMNS]
    assert table["id"].to_pylist() == [row["id"] for row in read_jsonl(Path(small["pool"]))]
    assert not list(tmp_path.glob("*.parts")) + list(tmp_path.glob("*.partial"))
    assert not (tmp_path / "run").exists()
    plain = table
    assert main([*asked, "--features"]) == 0
    table = pyarrow.parquet.read_table(tmp_path / "scores.parquet")
    assert table.column_names == ["id", *dict.fromkeys((*COLUMNS, *FEATURES))]
    assert table.select(plain.column_names).equals(plain)  # an adapter that is not trained changes nothing


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=scores.csv"], "must end in .parquet"),
        (["--trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy}"], "use `ddp`"),
        (["--data.max_length=4096"], None),
        (["--data.bach_size=3"], "did you mean"),
    ],
)
def test_what_cannot_be_is_refused(asked, flags, message, capsys):
    status = main([*asked, *flags])
    assert status == (2 if message else 0)
    assert message is None or message in capsys.readouterr().err


def test_a_pass_that_was_killed_goes_on_to_the_same_file(asked, tmp_path, monkeypatch):
    assert main(asked) == 0
    whole = (tmp_path / "scores.parquet").read_bytes()
    (tmp_path / "scores.parquet").unlink()
    write, done = PartFiles.write, []

    def until_killed(self, part, table):
        if len(done) == 2:
            raise KeyboardInterrupt
        write(self, part, table)
        done.append(part.number)

    monkeypatch.setattr(PartFiles, "write", until_killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(asked)
    assert len(list((tmp_path / "scores.parquet.parts").glob("*.npy"))) == 2
    assert not (tmp_path / "scores.parquet").exists()
    again: list[int] = []
    monkeypatch.setattr(
        PartFiles, "write", lambda self, part, table: again.append(part.number) or write(self, part, table)
    )
    assert main(asked) == 0
    assert not set(again) & set(done)
    assert (tmp_path / "scores.parquet").read_bytes() == whole


def test_parts_of_another_policy_do_not_count(asked, tmp_path, model, monkeypatch):
    assert main([*asked, f"--model.policy.path={model}"]) == 0
    expected = (tmp_path / "scores.parquet").read_bytes()
    write = PartFiles.write

    def killed(self, part, table):
        write(self, part, table)
        raise KeyboardInterrupt

    monkeypatch.setattr(PartFiles, "write", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(asked)
    monkeypatch.setattr(PartFiles, "write", write)
    assert main([*asked, f"--model.policy.path={model}"]) == 0
    assert (tmp_path / "scores.parquet").read_bytes() == expected


@pytest.mark.parametrize(("processes", "known"), [(2, 0), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_several_processes_write_the_same_file(asked, tmp_path, processes, known, monkeypatch):
    """Of four parts three are known in the second case, so two processes have nothing to do."""
    assert main(asked) == 0
    expected = (tmp_path / "scores.parquet").read_bytes()
    if known:
        write, done = PartFiles.write, []

        def until_killed(self, part, table):
            if len(done) == known:
                raise KeyboardInterrupt
            write(self, part, table)
            done.append(part.number)

        monkeypatch.setattr(PartFiles, "write", until_killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main([*asked, f"--output={tmp_path / 'several.parquet'}"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "s"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    flags = [*asked, "--trainer.strategy=ddp", f"--trainer.devices={processes}"]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "lit_bilevel", *flags, f"--output={tmp_path / 'several.parquet'}"],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes, outputs
    assert (tmp_path / "several.parquet").read_bytes() == expected


def test_entropy_is_chunked_and_exact(monkeypatch):
    from lit_bilevel import losses

    torch.manual_seed(0)
    layer = losses.OutputLayer(torch.randn(50, 8, dtype=torch.float64), torch.randn(50, dtype=torch.float64))
    hidden, target = torch.randn(33, 8, dtype=torch.float64), torch.randint(50, (33,))
    logits = layer.logits(hidden)
    largest = []
    original = losses.logits_nll_and_entropy
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * 50 * 10)
    monkeypatch.setattr(losses, "logits_nll_and_entropy", lambda z, t: largest.append(len(z)) or original(z, t))
    nll, entropy = losses.token_nll_and_entropy(hidden, layer, target)
    assert max(largest) == 10
    torch.testing.assert_close(nll, F.cross_entropy(logits, target, reduction="none"))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    masked = logits.clone()
    masked[:, 7] = -math.inf
    target[target == 7] = 8
    assert original(masked, target)[1].isfinite().all()

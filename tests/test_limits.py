"""Limits of the guard: weights that collapse and ratios that explode are named once, or stop the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from support.files import read_jsonl
from support.refining import refine_all, run
from support.resuming import fit, short

from lit_bilevel import Mixing
from lit_bilevel.errors import UserError
from lit_bilevel.refinement.response_weights import TokenRatio
from lit_bilevel.training.guard import Guard, GuardSettings
from lit_bilevel.weights import BMOWeights


class Collapse(Callback):
    """Puts nearly all weight on two rows after the fourth step."""

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if trainer.global_step == 4:
            weight_N = torch.full((90,), 1e-6)
            weight_N[7], weight_N[60] = 80.0, 10.0
            pl_module.weights.logits.data.zero_()  # what was learned would multiply the prior
            pl_module.weights.set_prior(weight_N)


def ids(small, *rows: int) -> list[str]:
    records = read_jsonl(Path(small["pool"]))
    return [repr(records[row]["id"]) for row in rows]


COLLAPSED = r"policy step 5: the weights have collapsed on a few rows: their effective size is 1\.2\d of 90 rows"


def test_collapsed_weights_are_named_once(small, tmp_path):
    with pytest.warns(UserWarning, match=COLLAPSED) as warned:
        model = run(small, tmp_path, Collapse(), steps=9)
    (text,) = [str(warning.message) for warning in warned if "collapsed" in str(warning.message)]
    heaviest = text.partition("the heaviest are ")[2]
    one, other = ids(small, 7, 60)
    assert heaviest.startswith(f"{one} (8")
    assert f"), {other} (" in heaviest
    assert "`kl_to_prior`" in text
    assert model.global_step == 9


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_collapsed_weights_stop_the_run_with_a_checkpoint_where_that_is_asked_for(small, tmp_path):
    flags = short(small, tmp_path)
    with pytest.raises(UserError, match=f"{COLLAPSED}.*so the run was stopped"):
        fit(flags, "--model.guard.on_limit=stop", callbacks=(Collapse(),))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    guard = Guard(GuardSettings(on_limit="stop"))
    guard.load_state_dict(checkpoint["lit_bilevel"]["guard"])
    assert not guard._is_new("weights")  # or a continued run would stop again at once


def test_weights_that_only_estimate_their_size_are_looked_at_after_an_epoch(small, tmp_path):
    class Heavy(Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            if trainer.global_step == 12:
                pl_module.weights.loss_N.fill_(100.0)
                pl_module.weights.loss_N[7] = 0.0

    with pytest.warns(UserWarning, match=rf"policy step 12: the weights have collapsed.*{ids(small, 7)[0]} \(90\)"):
        run(small, tmp_path, Heavy(), solver=Mixing(), weights=BMOWeights(), steps=13)


class Forget(Callback):
    """Makes the first token of one refined row's responses as good as impossible under the policy that sampled it."""

    row = -1

    def on_train_batch_end(self, trainer, pl_module, *rest):
        store = trainer.datamodule.responses
        if len(store) and self.row < 0:
            self.row = store.rows[3]
            for response in store.responses(self.row):
                response.token_logprobs[0] = -60.0


@pytest.mark.parametrize("on_limit", ["warn", "stop"])
def test_exploding_ratios_are_named_once_a_round(small, tmp_path, on_limit):
    forget, settings = Forget(), {"guard": GuardSettings(on_limit=on_limit), "response_weights": TokenRatio()}
    match = r"policy step \d+: importance ratios explode: a token of row '(.+)' \(a generated response\) is \d\.\d+e\+2"
    if on_limit == "stop":
        with pytest.raises(UserError, match=match) as stopped:
            run(small, tmp_path, refine_all(), watch=[forget], steps=25, **settings)
        texts = [str(stopped.value)]
    else:
        with pytest.warns(UserWarning, match=match) as warned:
            model = run(small, tmp_path, refine_all(), watch=[forget], steps=25, **settings)
        texts = [str(warning.message) for warning in warned if "explode" in str(warning.message)]
        assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    (text,) = texts  # though the row came by twice
    assert f"row {ids(small, forget.row)[0]} (a" in text


def test_limits_are_checked(small, tmp_path):
    wrong = GuardSettings(max_skipped_steps=0, min_effective_size=1.0, max_ratio=1.0)
    with pytest.raises(UserError, match=r"(?s)max_skipped_steps.*min_effective_size.*max_ratio"):
        run(small, tmp_path, Callback(), guard=wrong)

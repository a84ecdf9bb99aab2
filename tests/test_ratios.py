"""Response weights: each rule against its formula, and what it does in expectation."""

from __future__ import annotations

import math

import pytest
import torch

from lit_bilevel.errors import UserError
from lit_bilevel.refinement.response_weights import (
    Aligned,
    LengthNormalised,
    Ratios,
    SelfNormalised,
    SequenceRatio,
    TokenRatio,
    UniformRatio,
)

RULES = [UniformRatio(), TokenRatio(), SequenceRatio(), LengthNormalised(), SelfNormalised(0.5), Aligned()]


def example(log_ratio=None, alignment=None) -> Ratios:
    """Groups 0 (responses of 2 and 1 tokens), 2 (3 and 2 tokens) and 3 (1 token, alone); group 1 has none."""
    torch.manual_seed(0)
    log_ratio = torch.randn(9, dtype=torch.float64) if log_ratio is None else log_ratio
    response = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3, 4])
    alignment = torch.tensor([1.0, -2.0, 3.0, 1.0, 2.0]).double() if alignment is None else alignment
    return Ratios(log_ratio, response, torch.tensor([0, 0, 2, 2, 3]), 4, alignment)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_an_unchanged_policy_gives_equal_weights(rule):
    aligned = torch.full((5,), 2.5, dtype=torch.float64)
    weight_J, clipped_J = rule.weigh(example(torch.zeros(9, dtype=torch.float64), aligned))
    torch.testing.assert_close(weight_J, torch.ones(9, dtype=torch.float64))
    assert not clipped_J.any()


def test_each_rule_is_its_formula():
    ratios = example()
    rho = ratios.log_ratio_J.exp()
    parts = rho.split([2, 1, 3, 2, 1])
    product = torch.stack([part.prod() for part in parts])
    lengths = torch.tensor([2, 1, 3, 2, 1])
    torch.testing.assert_close(TokenRatio(100).weigh(ratios)[0], rho)
    torch.testing.assert_close(SequenceRatio(100).weigh(ratios)[0], product[ratios.response_J])
    torch.testing.assert_close(LengthNormalised(100).weigh(ratios)[0], (product ** (1 / lengths))[ratios.response_J])
    power = product**2
    expected = torch.cat([2 * power[:2] / power[:2].sum(), 2 * power[2:4] / power[2:4].sum(), torch.ones(1)])
    torch.testing.assert_close(SelfNormalised(0.5).weigh(ratios)[0], expected[ratios.response_J])
    expected = torch.tensor([2.0, 0.0, 1.5, 0.5, 1.0]).double()
    torch.testing.assert_close(Aligned().weigh(ratios)[0], expected[ratios.response_J])


@pytest.mark.parametrize(
    "rule", [TokenRatio(2.0), SequenceRatio(2.0), LengthNormalised(2.0)], ids=lambda r: type(r).__name__
)
def test_clipping_bounds_and_counts(rule):
    ratios = example(torch.tensor([5.0, 5.0, 0.1, -5.0, -5.0, -5.0, 0.0, 0.0, 0.0]).double())
    weight_J, clipped_J = rule.weigh(ratios)
    assert clipped_J.tolist() == [True, True, False, True, True, True, False, False, False]
    assert weight_J.max() == pytest.approx(2.0)
    assert weight_J.min() == pytest.approx(0.5)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_huge_ratios_stay_finite(rule):
    for sign in (1, -1):
        weight_J, _ = rule.weigh(example(torch.full((9,), sign * 400.0).double()))
        assert torch.isfinite(weight_J).all()
        assert (weight_J >= 0).all()


@pytest.mark.parametrize("rule", [SelfNormalised(0.7), Aligned()], ids=lambda rule: type(rule).__name__)
def test_relative_rules_have_mean_one_in_a_group(rule):
    ratios = example()
    weight_R = ratios.sums(rule.weigh(ratios)[0]) / ratios.length_R
    assert weight_R[:2].mean() == pytest.approx(1)
    assert weight_R[2:4].mean() == pytest.approx(1)


def test_a_group_whose_responses_all_point_away_counts_nothing():
    weight_J, _ = Aligned().weigh(example(alignment=torch.tensor([-1.0, -2.0, 1.0, 1.0, -3.0]).double()))
    assert weight_J.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("cls", [SelfNormalised, Aligned])
def test_a_lone_response_is_divided_by_the_mean_of_earlier_steps(cls):
    rule = cls()
    scores = torch.tensor([3.0, 5.0]).double()

    def lone(score: float) -> Ratios:
        value = torch.tensor([score]).double()
        return Ratios(value.log(), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1, value)

    both = Ratios(scores.log(), torch.arange(2), torch.arange(2), 2, scores)
    assert rule.weigh(lone(3.0))[0].item() == 1  # nothing earlier
    rule.follow(rule.singles(both))
    assert rule.mean == pytest.approx(4.0)
    whole = rule.weigh(both)[0]
    parts = torch.cat([rule.weigh(lone(3.0))[0], rule.weigh(lone(5.0))[0]])
    torch.testing.assert_close(whole, parts)  # micro-batches change nothing
    torch.testing.assert_close(whole, scores / 4)
    torch.testing.assert_close(rule.singles(both), rule.singles(lone(3.0)) + rule.singles(lone(5.0)))
    copy = cls()
    copy.load_state_dict(rule.state_dict())
    assert copy.mean == rule.mean


def test_the_running_mean_of_lone_scores_does_not_remember_the_first():
    rule, scores = Aligned(), [9.0, 1.0, 2.0, 4.0]
    share = torch.tensor([0.9**age for age in reversed(range(4))])
    for score in scores:
        rule.follow(torch.tensor([score, 1.0]))
    assert rule.mean == pytest.approx(float((share * torch.tensor(scores)).sum() / share.sum()))
    rule.follow(torch.tensor([math.nan, 1.0]))
    assert rule.mean == pytest.approx(float((share * torch.tensor(scores)).sum() / share.sum()))


def test_unclipped_sequence_ratios_teach_nothing_in_expectation():
    """E_{π_old}[ρ ∇ log π_θ] = 0, for the sum loss; `UniformRatio` pulls to π_old; one token is a whole response."""
    torch.manual_seed(1)
    old, logits = torch.randn(6).double(), torch.randn(6).double().requires_grad_()
    behaviour = old.softmax(0)
    logprob = logits.log_softmax(0)
    index = torch.arange(6)
    ratios = Ratios((logprob - behaviour.log()).detach(), index, index, 6)

    def expected(rule) -> torch.Tensor:
        weight = rule.weigh(ratios)[0]
        return torch.autograd.grad((behaviour * weight * logprob).sum(), logits, retain_graph=True)[0]

    assert expected(SequenceRatio(1e6)).abs().max() < 1e-12
    assert expected(TokenRatio(1e6)).abs().max() < 1e-12
    torch.testing.assert_close(expected(UniformRatio()), behaviour - logits.detach().softmax(0))
    assert expected(SequenceRatio(1.2)).abs().max() > 1e-3


def test_steps_without_alignment_do_not_blow_up_the_next_lone_response():
    rule = Aligned(clip=4.0)

    def lone(alignment: float) -> Ratios:
        first = torch.zeros(1, dtype=torch.int64)
        return Ratios(torch.zeros(1).double(), first, first, 1, torch.tensor([alignment]).double())

    for _ in range(40):
        rule.follow(rule.singles(lone(-1.0)))
    assert rule.weigh(lone(1e-3))[0].item() == 1
    rule.follow(rule.singles(lone(2.0)))
    for _ in range(40):
        rule.follow(rule.singles(lone(-1.0)))
    assert rule.weigh(lone(2.0))[0].item() == 1
    weight, clipped = rule.weigh(lone(20.0))
    assert (weight.item(), clipped.item()) == (4, True)


def test_an_overflow_does_not_spoil_the_running_mean():
    rule = Aligned()
    for total, expected in ((math.inf, None), (4.0, 2.0), (math.inf, 2.0), (math.nan, 2.0)):
        rule.follow(torch.tensor([total, 2.0]))
        assert rule.mean == expected


@pytest.mark.parametrize("make", [lambda: Aligned(1.0), lambda: TokenRatio(1.0), lambda: SelfNormalised(0.0)])
def test_wrong_settings_are_refused(make):
    with pytest.raises(UserError, match="it must be above"):
        make()


def test_effective_temperature():
    """τ → ∞ is uniform, τ → 0 takes the best response alone."""
    ratios = example()
    flat, _ = SelfNormalised(1e6).weigh(ratios)
    torch.testing.assert_close(flat, torch.ones(9).double(), atol=1e-4, rtol=0)
    sharp, _ = SelfNormalised(1e-3).weigh(ratios)
    assert sorted({round(value, 6) for value in sharp[:3].tolist()}) == [0.0, 2.0]
    assert math.isclose(sharp[8].item(), 1.0)

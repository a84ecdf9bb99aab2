"""When answers say the same, how far they agree, and whether new ones are to be trusted more than the old."""

from __future__ import annotations

import pytest
import torch

from lit_bilevel.errors import UserError
from lit_bilevel.refinement.alike import SameAnswer, SameNumber, SharedWords, agreement
from lit_bilevel.refinement.choose import BelowTypical
from lit_bilevel.refinement.consensus import Agreement, Product
from lit_bilevel.refinement.response_weights import Aligned, Ratios, SelfNormalised, TokenRatio
from lit_bilevel.refinement.trust import Agreed, Answered


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1100", " 1,100. ", True),
        ("4 + 4 = 8\n#### 8", "The answer is 8.0", True),
        (r"so \boxed{12}", "12", True),
        ("The cat sat.", "the cat  sat", True),
        ("costs 5", "costs 5.00", True),
        ("-3", "3", False),
        ("3 apples", "3 pears", False),
        ("", "", True),
        ("", "7", False),
        ("+", "-", False),
    ],
)
def test_the_same_answer_in_other_words(one, other, same):
    assert SameAnswer().same(one, other) is same
    assert SameAnswer().same(other, one) is same


def test_numbers_and_words():
    assert SameNumber().same("it is 3 apples, so 12", "12 pears")
    assert not SameNumber().same("12 of 3", "3 of 12")
    assert SameNumber().same("none", "None.")
    assert not SameNumber().same("none", "0")
    assert SharedWords().same("Paris is the capital", "the capital is Paris")
    assert SharedWords(0.5).same("a b", "b c")  # F1 = 2·1 / (2 + 2)
    assert not SharedWords(0.51).same("a b", "b c")
    with pytest.raises(UserError, match="least"):
        SharedWords(0.0)


def test_agreement_is_a_share_of_the_others():
    assert agreement(["8", "8.0", "7", None], SameAnswer()) == [1 / 3, 1 / 3, 0, 0]
    assert agreement(["x"], SameAnswer()) == [1]
    assert agreement([None], SameAnswer()) == [0]


@pytest.mark.parametrize("count", [2, 5])
def test_agreement_estimates_the_probability_of_what_an_answer_says(count):
    """E[agreement of y | y] = π(y), at every G, which a share of all answers would overstate."""
    probability = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    drawn = torch.multinomial(probability, 20_000 * count, True, generator=torch.Generator().manual_seed(0))
    answers = [[str(k) for k in row] for row in drawn.view(-1, count).tolist()]
    shares = [(k, share) for row in answers for k, share in zip(row, agreement(row, SameAnswer()), strict=True)]
    for k in range(3):
        own = [share for key, share in shares if key == str(k)]
        assert sum(own) / len(own) == pytest.approx(float(probability[k]), abs=0.01)


def questions(old_right: float, new_right: float, count: int = 200, wrong: int = 50) -> list[Answered]:
    """Questions with the right answer 0, whose old and new answers (two) are right so often, each by itself."""
    generator = torch.Generator().manual_seed(1)

    def draw(right: float) -> str:
        other = int(torch.randint(1, wrong, (), generator=generator))
        return "0" if float(torch.rand((), generator=generator)) < right else str(other)

    return [Answered(draw(old_right), (draw(new_right), draw(new_right))) for _ in range(count)]


def test_shares_of_right_answers_are_estimated_without_knowing_them():
    verdict = Agreed().judge(questions(0.3, 0.6, 4000), questions(1.0, 0.6, 4000))
    assert verdict.least == 0
    assert verdict.new_right == pytest.approx(0.6, abs=0.03)
    assert verdict.old_right == pytest.approx(0.3, abs=0.05)


def test_a_policy_that_cannot_do_the_task_is_not_trusted():
    verdict = Agreed().judge(questions(0.0, 0.02), questions(1.0, 0.02, 64))
    assert verdict.least is None
    assert "right in about" in verdict.reason


def test_good_old_answers_are_kept():
    """Also where the policy agrees with itself on a wrong answer, as it does here: there is only one."""
    assert Agreed().judge(questions(0.9, 0.6, wrong=2), questions(1.0, 0.6, 64, wrong=2)).least is None


def test_where_all_together_are_no_better_those_that_agree_may_be():
    """Half of the questions are easy (0.9 right), half hopeless; half of the old answers are right."""
    chosen = questions(0.5, 0.9) + questions(0.5, 0.02)
    trusted = questions(1.0, 0.9, 32) + questions(1.0, 0.02, 32)
    verdict = Agreed().judge(chosen, trusted)
    assert verdict.least == 1
    assert verdict.new_right > 0.8


def test_chosen_questions_may_be_harder_than_trusted_ones():
    """Most trusted questions are easy, few of the chosen ones are, and the others have few wrong answers."""
    chosen = questions(0.3, 0.9, 300) + questions(0.3, 0.05, 700, wrong=6)
    trusted = questions(1.0, 0.9, 50) + questions(1.0, 0.05, 14, wrong=6)
    right = {least: [] for least in (0, 1)}
    for question in chosen:
        for agreed, text in zip(Agreed().agreement(question.new), question.new, strict=True):
            for least in right:
                right[least] += [text == "0"] if agreed >= least else []
    share = {least: sum(answers) / len(answers) for least, answers in right.items()}
    assert share[0] < 0.33  # as good as the old ones
    verdict = Agreed().judge(chosen, trusted)
    assert verdict.least == 1
    # their agreeing answers are wrong more often than those to trusted questions, which is not known
    assert share[1] < verdict.new_right < 1
    assert verdict.old_right == pytest.approx(0.3, abs=0.12)


def test_an_agreement_that_few_trusted_questions_have_is_judged_with_lower_ones():
    chosen = [Answered("1", ("0", "0"))] * 20
    trusted = [Answered("0", ("0", "0"))] * 7 + [Answered("0", ("0", "1"))] * 57
    assert Agreed(fewest=8).judge(chosen, trusted).new_right == pytest.approx((7 + 57 / 2) / 65)
    assert Agreed(fewest=7).judge(chosen, trusted).new_right == pytest.approx(7 / 8)


def test_a_few_lucky_answers_prove_nothing():
    trusted = [Answered("0", ("0", "0"))] * 7 + [Answered("0", (None, None))] * 57
    verdict = Agreed(fewest=8).judge(questions(0.0, 1.0), trusted)
    assert verdict.least is None
    assert "fewer than 8" in verdict.reason
    assert Agreed(fewest=8).judge(questions(0.0, 1.0), [*trusted, Answered("0", ("0", "0"))]).least == 1


def test_answers_that_agree_as_no_trusted_ones_do_are_not_judged():
    """All trusted answers agree; so little as chosen ones do is not known."""
    verdict = Agreed().judge([Answered("1", ("0", "2"))] * 20, [Answered("0", ("0", "0"))] * 64)
    assert verdict.least is None
    assert "no trusted question has answers that agree as far" in verdict.reason


def test_settings_of_agreed_are_checked():
    with pytest.raises(UserError, match="questions"):
        Agreed(questions=0)
    with pytest.raises(UserError, match="cannot be more"):
        Agreed(questions=4)


def ratios(**more) -> Ratios:
    """Two groups of two responses, of 2, 1, 1 and 3 tokens."""
    log_ratio = torch.linspace(-1, 1, 7, dtype=torch.float64)
    response, group = torch.tensor([0, 0, 1, 2, 3, 3, 3]), torch.tensor([0, 0, 1, 1])
    agreement = torch.tensor([2.0, 1.0, 0.0, 1.0]).double()  # mean 1 over the round
    return Ratios(log_ratio, response, group, 2, torch.tensor([1.0, 2.0, 3.0, -1.0]).double(), agreement)


def test_responses_count_by_their_agreement():
    weight_J, clipped_J = Agreement().weigh(ratios())
    assert weight_J.tolist() == [2, 2, 1, 0, 1, 1, 1]
    assert not clipped_J.any()


def test_a_product_is_one_and_keeps_the_state_of_each():
    rules = [Agreement(), TokenRatio(1.5), Aligned()]
    product = Product(rules)
    expected = torch.stack([rule.weigh(ratios())[0] for rule in rules]).prod(0)
    torch.testing.assert_close(product.weigh(ratios())[0], expected)
    assert torch.equal(product.weigh(ratios())[1], rules[1].weigh(ratios())[1])
    assert product.needs_alignment
    assert product.needs_agreement
    product.follow(torch.tensor([0.0, 0.0, 0.0, 0.0, 6.0, 2.0]))
    assert rules[2].mean == 3
    copy = Product([Agreement(), TokenRatio(1.5), Aligned()])
    copy.load_state_dict(product.state_dict())
    assert copy.rules[2].mean == 3
    assert len(product.singles(ratios())) == product.counted == 6
    with pytest.raises(UserError, match="two or more"):
        Product([SelfNormalised()])


@pytest.mark.parametrize("bad", [0.0, 0.05, 0.3, 0.6])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_as_many_rows_are_chosen_as_weigh_little(bad, scale):
    """Weights of two kinds with noise; the public rule takes its share whatever the weights say."""
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = scale * (0.4 * noise).exp()
    count = int(4000 * bad)
    weight[:count] /= 12
    chosen = BelowTypical(most=1.0).rows(weight, 0)
    assert len(set(chosen.tolist()) & set(range(count))) >= 0.95 * count
    assert len(chosen) <= count + 0.03 * 4000
    assert len(BelowTypical(most=0.1).rows(weight, 0)) == min(len(chosen), 400)
    assert len(BelowTypical().rows(torch.ones(50), 0)) == 0

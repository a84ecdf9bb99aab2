"""Every weighting: mean 1, whatever the order of visits, under every weight optimizer it is accepted with."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from support.problems import WEIGHT_OPTIMIZERS, WEIGHTINGS, normal
from torchmetrics.functional.classification import binary_auroc

from lit_bilevel import BMOWeights, ExampleWeights, ExponentiatedGradient, NetworkWeights, SoftmaxWeights
from lit_bilevel.errors import UserError
from lit_bilevel.types import PADDING_ROW, Features
from lit_bilevel.weights.optimizer import check_optimizer
from lit_bilevel.weights.undo import Undo

ROWS, BATCH = 64, 8
LEARNED = [name for name, make in WEIGHTINGS.items() if make().learnable]
RUNNING = [name for name, make in WEIGHTINGS.items() if make().needs_scoring]


def built(name: str, dtype=torch.float64) -> ExampleWeights:
    weights = WEIGHTINGS[name]()
    weights.build(torch.arange(ROWS) % 2, dtype)
    return weights


def accepted() -> list[tuple[str, str]]:
    """All pairs of weighting and optimizer that a run may combine; settings of a class with the default one alone."""
    pairs = []
    for name, optimizer in itertools.product(LEARNED, WEIGHT_OPTIMIZERS):
        if "+" in name and optimizer != "exponentiated_gradient":
            continue
        weights = built(name)
        try:
            check_optimizer(weights, WEIGHT_OPTIMIZERS[optimizer](weights.parameters()))
            pairs.append((name, optimizer))
        except UserError:
            pass
    return pairs


def features_of(rows, loss_N):
    return Features(rows, rows % 2, 5 + rows % 7, loss_N[rows])


def visit(weights, optimizer, epochs, score, loss_N, seed=0, check=lambda: None, order=None):
    """Visit all rows once an epoch in random batches; `score(step, rows)` gives s."""
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(ROWS, generator=generator).split(BATCH):
            rows = batch if order is None else order[batch]
            features = features_of(rows, loss_N) if order is None else features_of_permuted(batch, order, loss_N)
            weights.observe(features)
            if optimizer is not None:
                weights.set_gradient(features, score(step, batch))
                optimizer.step()
                optimizer.zero_grad()
                weights.after_step()
            step += 1
            check()
        weights.recount()
    if weights.needs_scoring:
        rows = torch.arange(ROWS)
        weights.score(features_of(rows, loss_N) if order is None else features_of_permuted(rows, order, loss_N))
    with torch.no_grad():
        return weights.table()


def features_of_permuted(batch, order, loss_N):
    """What `features_of` gives for `batch`, with each row stored at another place of the pool."""
    return Features(order[batch], batch % 2, 5 + batch % 7, loss_N[batch])


def spread(table) -> float:
    return float(table.max() - table.min())


EQUAL = torch.full((ROWS,), 2.0, dtype=torch.float64)
GROUPS = 1.0 + (torch.arange(ROWS) % 2).double()


# ---- order of visits ----


@pytest.mark.parametrize(("name", "optimizer"), accepted())
def test_equal_scores_leave_weights_equal(name, optimizer):
    def drifting(step, rows):
        return (3 + 2 * math.sin(step / 7)) * torch.ones(len(rows)).double() * 0.999**step

    weights = built(name)
    table = visit(weights, WEIGHT_OPTIMIZERS[optimizer](weights.parameters()), 20, drifting, EQUAL)
    assert spread(table) < 1e-6


@pytest.mark.parametrize(("name", "optimizer"), accepted())
def test_rounding_noise_is_not_blown_up(name, optimizer):
    noise = normal(200 * ROWS // BATCH, BATCH, seed=1)
    weights = built(name)
    table = visit(
        weights,
        WEIGHT_OPTIMIZERS[optimizer](weights.parameters()),
        200,
        lambda step, rows: 3 * (1 + 1e-7 * noise[step]),
        EQUAL,
    )
    assert spread(table) < 1e-2


@pytest.mark.parametrize(("name", "optimizer"), accepted())
def test_two_groups_are_told_apart(name, optimizer):
    weights = built(name)
    table = visit(
        weights, WEIGHT_OPTIMIZERS[optimizer](weights.parameters()), 10, lambda step, rows: GROUPS[rows], GROUPS
    )
    assert binary_auroc(table, (GROUPS == 1).long()) == 1.0


@pytest.mark.parametrize("optimizer", ["sparse_adam", "sgd+momentum", "adam", "adamw", "rmsprop"])
def test_an_optimizer_that_spoils_the_order_is_refused(optimizer):
    weights = SoftmaxWeights()
    weights.build(torch.zeros(4, dtype=torch.int64))
    made = WEIGHT_OPTIMIZERS[optimizer](weights.parameters())
    with pytest.raises(UserError, match=f"`{type(made).__name__}` is not safe for `SoftmaxWeights`") as error:
        check_optimizer(weights, made)
    assert "ExponentiatedGradient" in str(error.value) or "set both to 0" in str(error.value)


@pytest.mark.parametrize(("name", "optimizer"), [("softmax", "sparse_adam"), ("network", "adamw"), ("source", "adam")])
def test_what_is_refused_does_blow_up_noise(name, optimizer):
    noise = normal(200 * ROWS // BATCH, BATCH, seed=1)
    weights = built(name)
    table = visit(
        weights,
        WEIGHT_OPTIMIZERS[optimizer](weights.parameters()),
        200,
        lambda step, rows: 3 * (1 + 1e-7 * noise[step]),
        EQUAL,
    )
    assert spread(table) > 1e-2


def test_bmo_at_export_does_not_know_the_order_of_visits():
    weights = built("bmo")
    falling = EQUAL.clone()
    for rows in torch.randperm(ROWS).split(BATCH):  # losses fall during the epoch
        falling *= 0.9
        weights.observe(features_of(rows, falling))
    assert spread(weights.table()) > 0.1
    weights.score(features_of(torch.arange(ROWS), EQUAL))
    assert spread(weights.table()) < 1e-12


def test_bmo_tells_two_groups_apart():
    table = visit(built("bmo"), None, 3, None, GROUPS)
    assert binary_auroc(table, (GROUPS == 1).long()) == 1.0


@pytest.mark.parametrize("name", LEARNED)
def test_a_batch_of_one_row_is_refused(name):
    with pytest.raises(UserError, match=r"batch_size.*at least 2"):
        built(name).set_gradient(features_of(torch.tensor([3]), EQUAL), torch.ones(1).double())


@pytest.mark.parametrize("nothing", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("name", LEARNED)
def test_a_step_without_scores_says_nothing_of_their_scale(name, nothing):
    """c and all that follows are those of a run without such steps, which come first, once or often, and in between."""
    rows, scores = torch.arange(2 * BATCH), normal(6, 2 * BATCH, seed=7)
    given = {}
    for first, between in ((0, 0), (1, 0), (4, 3)):
        weights = built(name)
        optimizer = ExponentiatedGradient(weights.parameters())
        empty = torch.full((2 * BATCH,), nothing, dtype=torch.float64)
        steps = [empty] * first + [s for score in scores for s in [score, *[empty] * between]]
        features = features_of(rows, GROUPS)
        weights.observe(features)
        for s_B in steps:
            weights.set_gradient(features, s_B)
            optimizer.step()
            optimizer.zero_grad()
            weights.after_step()
        given[first, between] = weights.updates[None]
        if weights.kl_to_prior == 0:  # whose pull needs no scores
            averages = torch.stack([weights.spread_average, weights.score_average])
            given[first, between] = torch.cat([weights.updates[None], averages, weights(features).double()])
    assert torch.equal(given[0, 0], given[1, 0])
    assert torch.equal(given[0, 0], given[4, 3])
    assert given[0, 0][0] == 6


def test_one_finite_score_has_nothing_to_be_compared_with():
    weights = built("softmax")
    s_B = torch.full((BATCH,), math.nan, dtype=torch.float64)
    s_B[3] = 1.0
    weights.set_gradient(features_of(torch.arange(BATCH), EQUAL), s_B)
    assert weights.updates == 0
    assert not weights.logits.grad.to_dense().any()


def test_rows_without_a_finite_score_do_not_shrink_the_scale():
    whole, broken = built("softmax"), built("softmax")
    s_B = normal(BATCH, seed=7)
    whole.set_gradient(features_of(torch.arange(BATCH), EQUAL), s_B)
    more_B = torch.cat([s_B, torch.full((BATCH,), math.nan, dtype=torch.float64)])
    broken.set_gradient(features_of(torch.arange(2 * BATCH), EQUAL), more_B)
    torch.testing.assert_close(broken.spread_average, whole.spread_average)
    torch.testing.assert_close(broken.logits.grad.to_dense(), whole.logits.grad.to_dense())


# ---- what weights are ----


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_finite_nonnegative_and_of_mean_one(name):
    weights = built(name)
    rows = torch.arange(ROWS)
    loss_N = normal(ROWS, seed=3).abs()

    def check():
        table = weights.table()
        assert torch.isfinite(table).all()
        assert table.min() >= 0
        assert abs(table.mean() - 1) < 1e-12
        if name not in RUNNING:
            assert abs(weights(features_of(rows, loss_N)).mean() - 1) < 1e-9
            torch.testing.assert_close(weights(features_of(rows, loss_N)).double(), table, rtol=0, atol=1e-9)

    check()
    optimizer = ExponentiatedGradient(weights.parameters()) if weights.learnable else None
    visit(weights, optimizer, 5, lambda step, rows: loss_N[rows] * 3, loss_N, check=check)
    check()
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.mul_(1e4)  # extreme logits
    weights.recount()
    check()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_statistics_are_those_of_the_table(name):
    weights = built(name)
    optimizer = ExponentiatedGradient(weights.parameters()) if weights.learnable else None
    visit(weights, optimizer, 3, lambda step, rows: GROUPS[rows], GROUPS)
    if name in RUNNING:
        visit(weights, None, 6, None, GROUPS)  # running means over windows, so the weights have to stand still
    table, statistics = weights.table(), weights.statistics()
    share = table / table.sum()
    tolerance = 0.05 if name in RUNNING else 1e-9
    assert float(statistics["effective_size"] * (share**2).sum()) == pytest.approx(1, rel=tolerance)
    if "entropy" in statistics:
        entropy = -torch.xlogy(share, share).sum()
        assert float(statistics["entropy"]) == pytest.approx(float(entropy), rel=tolerance)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_permuting_rows_permutes_weights(name):
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    scores = normal(ROWS, seed=6).abs()
    plain, permuted = built(name), WEIGHTINGS[name]()
    sources = torch.empty(ROWS, dtype=torch.int64)
    sources[order] = torch.arange(ROWS) % 2
    permuted.build(sources, torch.float64)

    def run(weights, place):
        optimizer = ExponentiatedGradient(weights.parameters()) if weights.learnable else None
        return visit(weights, optimizer, 4, lambda step, rows: scores[rows], scores, order=place)

    torch.testing.assert_close(run(plain, torch.arange(ROWS)), run(permuted, order)[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_padding_weighs_nothing(name):
    weights = built(name)
    rows = torch.tensor([0, PADDING_ROW, 2])
    out = weights(Features(rows, torch.tensor([0, 0, 0]), torch.tensor([3, 3, 3]), torch.ones(3).double()))
    assert out[1] == 0
    assert out[0] > 0


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_checkpoint_brings_everything_back(name):
    weights, other = built(name), built(name)
    optimizer = ExponentiatedGradient(weights.parameters()) if weights.learnable else None
    loss_N = normal(ROWS, seed=8).abs()
    visit(weights, optimizer, 2, lambda step, rows: loss_N[rows], loss_N)
    other.load_state_dict(copy.deepcopy(weights.state_dict()))
    tables = []
    for each in (weights, other):
        optimizer = ExponentiatedGradient(each.parameters()) if each.learnable else None
        tables.append(visit(each, optimizer, 2, lambda step, rows: loss_N[rows], loss_N, seed=9))
    assert torch.equal(*tables)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_precision_is_kept_when_the_module_is_cast(name):
    weights = built(name, torch.float32)
    before = {key: value.dtype for key, value in weights.state_dict().items()}
    weights.to(torch.bfloat16)
    assert {key: value.dtype for key, value in weights.state_dict().items()} == before


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_what_is_logged_follows_the_weights_to_another_device(name):
    weights = built(name).to("meta")
    assert {value.device.type for value in (weights.visits, *weights.statistics().values())} == {"meta"}


# ---- gradients ----


def test_the_network_gets_the_gradient_of_the_weighted_mean():
    weights = built("network")
    with torch.no_grad():
        for index, parameter in enumerate(weights.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=index))
    features = features_of(torch.arange(ROWS), normal(ROWS, seed=1).abs())
    score_B = normal(ROWS, seed=2)
    weights.observe(features)
    weights.assign_gradient(features, score_B)
    direction = [normal(*parameter.shape, seed=10 + i) for i, parameter in enumerate(weights.parameters())]
    expected = sum((p.grad * d).sum() for p, d in zip(weights.parameters(), direction, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, d in zip(weights.parameters(), direction, strict=True):
                parameter.add_(d, alpha=sign * 1e-6)
            values.append((weights.weigh(features) * score_B).mean())
            for parameter, d in zip(weights.parameters(), direction, strict=True):
                parameter.sub_(d, alpha=sign * 1e-6)
    assert float((values[0] - values[1]) / 2e-6) == pytest.approx(float(expected), abs=1e-8)


def test_softmax_steps_along_the_mirror_descent_of_the_whole_gradient():
    weights = built("softmax")
    with torch.no_grad():
        weights.logits.copy_(normal(ROWS, seed=1))
    weights.recount()
    s = normal(ROWS, seed=2).tanh()  # none so far out that it is cut
    p = weights.table() / ROWS
    weights.set_gradient(features_of(torch.arange(ROWS), EQUAL), s)
    coupled = p * (s - (p * s).sum())  # dF/dω of mean_i s_i·w_i
    mirrored = weights.logits.grad.to_dense() * p
    torch.testing.assert_close(mirrored / mirrored.norm(), coupled / coupled.norm())


def test_the_network_weighs_rows_it_never_saw():
    weights = built("network")
    seen = torch.arange(ROWS)[GROUPS == 1][:16], torch.arange(ROWS)[GROUPS == 2][:16]
    optimizer = ExponentiatedGradient(weights.parameters())
    for _ in range(50):
        rows = torch.cat(seen)
        features = features_of(rows, GROUPS)
        weights.observe(features)
        weights.set_gradient(features, GROUPS[rows])
        optimizer.step()
    new = Features(
        torch.tensor([60, 63]), torch.tensor([0, 1]), torch.tensor([6, 6]), torch.tensor([1.0, 2.0]).double()
    )
    low, high = weights(new)
    assert low > high


# ---- BMO ----


def test_bmo_is_the_softmax_of_the_losses():
    weights, loss_N = built("bmo"), normal(ROWS, seed=1).abs()
    weights.observe(features_of(torch.arange(ROWS), loss_N))
    expected = ROWS * torch.softmax(-loss_N / 0.5, 0)
    torch.testing.assert_close(weights.table(), expected)
    torch.testing.assert_close(weights(features_of(torch.arange(ROWS), loss_N)), expected)


def test_the_running_normaliser_is_that_of_the_method():
    weights, losses = BMOWeights(temperature=0.7, decay=0.9), normal(5, ROWS, seed=2).abs()
    weights.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    running = 0.0
    for step, loss_N in enumerate(losses):
        weights.observe(features_of(torch.arange(ROWS), loss_N))
        running = 0.9 * running + 0.1 * (-loss_N / 0.7).exp().mean()
        torch.testing.assert_close(weights.log_normaliser, (running / (1 - 0.9 ** (step + 1))).log())


def test_a_window_without_a_finite_loss_is_not_counted():
    weights, other = built("bmo"), built("bmo")
    rows, loss_N = torch.arange(ROWS), normal(ROWS, seed=2).abs()
    for each, windows in ((weights, (torch.nan, 1.0, torch.inf, 2.0)), (other, (1.0, 2.0))):
        for factor in windows:
            each.observe(features_of(rows, loss_N * factor))
    assert torch.equal(weights.log_normaliser, other.log_normaliser)
    assert all(torch.equal(weights.statistics()[key], other.statistics()[key]) for key in ("effective_size", "entropy"))


def test_before_any_window_every_row_weighs_one():
    for name in RUNNING:
        weights = built(name)
        assert torch.equal(weights(features_of(torch.arange(ROWS), GROUPS)), torch.ones(ROWS).double())
        assert weights.statistics()["effective_size"] == ROWS
        assert float(weights.statistics()["entropy"]) == pytest.approx(math.log(ROWS))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_weights_that_training_uses_have_mean_one(name):
    """Each window's, over the first few hundred steps, in which the losses of a young policy fall fast."""
    weights, generator = built(name), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(normal(*parameter.shape, seed=4))
    weights.recount()
    hard_N, means = normal(ROWS, seed=5).abs() / 2, []
    for step in range(300):
        rows = torch.randperm(ROWS, generator=generator)[: 2 * BATCH]
        features = features_of(rows, hard_N + 1.0 + 0.5 * math.exp(-step / 60))
        weights.observe(features)
        means.append(weights(features).mean())
    parts = torch.stack([part.mean() for part in torch.stack(means).split(60)])
    assert (parts - 1).abs().max() < 0.3, parts  # the normaliser is some hundred windows behind
    assert parts[-1] == pytest.approx(1, abs=0.1)


def test_losses_too_large_for_exp():
    weights = built("bmo")
    weights.observe(features_of(torch.arange(ROWS), GROUPS * 1e4))
    assert torch.isfinite(weights.table()).all()
    assert abs(weights.table().mean() - 1) < 1e-12


# ---- settings ----


def test_a_floor_is_kept():
    weights = built("softmax+floor")
    visit(weights, ExponentiatedGradient(weights.parameters()), 40, lambda step, rows: GROUPS[rows], GROUPS)
    assert weights.table().min() == pytest.approx(0.1, abs=1e-6)


def test_a_cap_is_kept_at_the_end_of_an_epoch():
    weights = built("softmax+cap")
    scores = normal(ROWS, seed=4)
    table = visit(weights, ExponentiatedGradient(weights.parameters()), 30, lambda step, rows: scores[rows], EQUAL)
    assert table.max() == pytest.approx(3.0, rel=1e-12)
    assert (table > 3 - 1e-9).sum() > 2
    free = SoftmaxWeights()
    free.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    with torch.no_grad():
        free.logits.copy_(weights.logits)
    assert free.table().max() > 4


def test_a_gate_keeps_the_asked_share():
    weights = SoftmaxWeights(keep=0.25)
    weights.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    scores = normal(ROWS, seed=4)
    table = visit(weights, ExponentiatedGradient(weights.parameters()), 5, lambda step, rows: scores[rows], EQUAL)
    assert (table > 0).sum() == 16
    assert set(table.nonzero()[:, 0].tolist()) == set(scores.argsort()[:16].tolist())
    with torch.no_grad():  # a row that was gated out comes back when its score turns
        worst = int(scores.argmax())
        weights.logits[worst] = weights.logits.max()
    weights.recount()
    assert weights.table()[worst] > 0


def test_the_pull_to_the_prior_settles_at_the_softmax_of_the_scores():
    weights = SoftmaxWeights(kl_to_prior=0.5)
    weights.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    rows, scores, prior = torch.arange(ROWS), normal(ROWS, seed=4), normal(ROWS, seed=6).exp()
    weights.set_prior(prior)
    optimizer = ExponentiatedGradient(weights.parameters(), lr=0.1)
    for _ in range(3000):
        weights.set_gradient(features_of(rows, EQUAL), scores)
        optimizer.step()
        weights.after_step()
    b = (weights.table() * scores).mean()
    scaled = ((scores - b) / (scores - b).abs().mean()).clamp(-3, 3)
    expected = ROWS * torch.softmax(weights.log_prior_N.double() - scaled / 0.5, 0)
    torch.testing.assert_close(weights.table(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "softmax+temperature", "softmax+cap"])
def test_a_table_starts_from_earlier_weights(name):
    weights, earlier = built(name), normal(ROWS, seed=4).exp()
    earlier = (earlier / earlier.mean()).clamp_max(2.0)
    earlier = earlier / earlier.mean()
    weights.set_prior(earlier)
    torch.testing.assert_close(weights.table(), earlier)


def test_sources_start_from_the_mean_of_their_rows():
    weights = built("source")
    weights.set_prior(GROUPS * torch.where(torch.arange(ROWS) < 32, 0.5, 1.5))
    torch.testing.assert_close(weights.table(), GROUPS / 1.5)


def test_equal_weights_refuse_a_prior():
    with pytest.raises(UserError, match="SigmoidWeights"):
        built("uniform").set_prior(GROUPS)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "network", "bmo"])
def test_learning_multiplies_the_prior(name):
    """The weights that learning gives after a prior are those without it, times the prior, over their mean."""
    prior = normal(ROWS, seed=4).exp()
    tables = []
    for weights in (built(name), built(name)):
        if tables:
            weights.set_prior(prior)
            features = features_of(torch.arange(ROWS), EQUAL)
            torch.testing.assert_close(weights(features).double(), prior / prior.mean())  # before any step
        if name == "bmo":
            weights.observe(features_of(torch.arange(ROWS), normal(ROWS, seed=5).abs()))
        elif name == "network":
            with torch.no_grad():
                weights.network[-1].weight.fill_(0.5)
            weights.observe(features_of(torch.arange(ROWS), normal(ROWS, seed=5).abs()))
        else:
            with torch.no_grad():
                weights.logits.copy_(normal(ROWS, seed=5))
            weights.recount()
        tables.append(weights.table())
    torch.testing.assert_close(tables[1], prior * tables[0] / (prior * tables[0]).mean(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "network", "bmo", "source"])
def test_weights_of_a_prior_have_mean_one(name):
    weights = built(name)
    weights.set_prior(GROUPS * 3)
    weights.observe(features_of(torch.arange(ROWS), EQUAL))
    assert abs(float(weights(features_of(torch.arange(ROWS), EQUAL)).double().mean()) - 1) < 1e-5


def test_a_row_of_prior_zero_stays_near_zero_and_learning_goes_on():
    weights = built("softmax")
    prior = torch.ones(ROWS)
    prior[3] = 0.0
    weights.set_prior(prior)
    table = visit(weights, ExponentiatedGradient(weights.parameters()), 5, lambda step, rows: rows.double(), EQUAL)
    assert table.isfinite().all()
    assert table[3] < 1e-6
    assert table[0] > table[ROWS - 1]


@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, -1.0], [0.0, 0.0], [1.0, 1.0, 1.0]])
def test_a_prior_that_says_nothing_is_refused(bad):
    weights = SoftmaxWeights()
    weights.build(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="prior"):
        weights.set_prior(torch.tensor(bad))


def test_scores_of_the_whole_pool_settle_in_closed_form():
    prior, scores = normal(ROWS, seed=4).exp(), normal(ROWS, seed=5)
    weights = SoftmaxWeights(kl_to_prior=0.5)
    weights.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    weights.set_prior(prior)
    p = prior / prior.mean()
    centred = scores - (p * scores).mean()
    weights.settle(scores, 0.5)
    expected = p * torch.exp(-(centred / centred.abs().mean()).clamp(-3, 3) / 0.5)
    torch.testing.assert_close(weights.table(), expected / expected.mean(), rtol=1e-5, atol=1e-9)
    features = features_of(torch.arange(ROWS), EQUAL)
    torch.testing.assert_close(weights(features), weights.table())  # the running sums know it


def test_a_row_without_a_finite_score_settles_at_its_prior():
    weights = built("softmax")
    scores = normal(ROWS, seed=5)
    scores[2] = math.nan
    weights.settle(scores, 1.0)
    assert weights.table().isfinite().all()
    assert weights.logits[2] == 0
    weights.settle(torch.full((ROWS,), math.nan), 1.0)
    torch.testing.assert_close(weights.table(), torch.ones(ROWS).double())


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": 0}, "temperature"),
        ({"floor": 1}, "floor"),
        ({"keep": 0}, "keep"),
        ({"keep": 0.5, "cap": 2}, "cap"),
        ({"cap": 1}, "cap"),
        ({"keep": 0.5, "floor": 0.1}, "floor"),
        ({"kl_to_prior": -1}, "kl_to_prior"),
    ],
)
def test_bad_settings_are_named(settings, word):
    with pytest.raises(UserError, match=word):
        SoftmaxWeights(**settings)


def test_one_source_is_refused():
    weights = WEIGHTINGS["source"]()
    weights.build(torch.ones(4, dtype=torch.int64))  # a group of refined rows may have one source
    assert torch.equal(weights.table(), torch.ones(4).double())
    assert torch.isfinite(torch.stack(list(weights.statistics().values()))).all()
    with pytest.raises(UserError, match="`source` column"):
        check_optimizer(weights, ExponentiatedGradient(weights.parameters()))


def test_rows_that_come_twice_in_a_window_keep_the_sums_right():
    weights = built("softmax")
    rows = torch.tensor([3, 3, 5, 7])
    weights.set_gradient(features_of(rows, EQUAL), normal(4, seed=1))
    ExponentiatedGradient(weights.parameters()).step()
    weights.after_step()
    assert abs(weights(features_of(torch.arange(ROWS), EQUAL)).mean() - 1) < 1e-12


def test_the_network_is_the_same_on_every_process():
    state = torch.get_rng_state()
    torch.manual_seed(1)
    first = built("network").state_dict()
    torch.manual_seed(2)
    second = built("network").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first if "weight" in key)
    torch.set_rng_state(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch, "manual_seed")  # which would also seed accelerators, and these stay so
        built("network")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(built("network"), NetworkWeights)


def test_a_floor_is_not_added_twice():
    earlier = torch.tensor([0.2, 0.3, 1.0, 2.5], dtype=torch.float64)
    weights = SoftmaxWeights(floor=0.1)
    weights.build(torch.zeros(4, dtype=torch.int64), torch.float64)
    weights.set_prior(3 * earlier)
    torch.testing.assert_close(weights.table(), earlier)


def test_any_number_of_sources_is_remembered():
    weights = NetworkWeights()
    weights.build(torch.arange(40_000))
    assert torch.equal(weights.source_N.long(), torch.arange(40_000))


# ---- a step that is taken back ----


@pytest.mark.parametrize(("name", "optimizer"), [*accepted(), ("bmo", None), ("uniform", None)])
@pytest.mark.parametrize("earlier", [0, 3])
def test_a_step_that_is_taken_back_leaves_no_trace(name, optimizer, earlier):
    """Weights, averages and the optimizer's state are those of a run that never took it, and so is what follows."""
    pairs = []
    for skipped in (False, True):
        weights = built(name)
        stepped = WEIGHT_OPTIMIZERS[optimizer](weights.parameters()) if optimizer else None
        for step in range(earlier + 4):
            rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[:BATCH]
            rows = torch.cat([rows, rows[:2]])  # a window may hold a row twice
            features = features_of(rows, GROUPS + step)
            if step == earlier and not skipped:
                continue
            undo = Undo(weights, stepped, rows)
            weights.observe(features)
            if stepped is not None:
                weights.set_gradient(features, normal(len(rows), seed=step))
                stepped.step()
                stepped.zero_grad()
                weights.after_step()
            if step == earlier:
                assert int(weights.visits.sum()) == (earlier + 1) * len(rows)
                undo.take_back()
                assert int(weights.visits.sum()) == earlier * len(rows)
        pairs.append((weights.state_dict(), stepped.state_dict() if stepped else {}))
    (weights, state), (again, state_again) = pairs
    for key, value in weights.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0, equal_nan=True, msg=key)
    torch.testing.assert_close(state_again, state, rtol=0, atol=0)


def test_taking_back_a_step_copies_no_table():
    """O(batch) at any N: what is copied whole has a few numbers."""
    for name in WEIGHTINGS:
        weights = built(name)
        if name == "network":
            weights.network = weights.source_embedding = torch.nn.Identity()  # large, and of a size of its own
        copies = Undo(weights, None, torch.arange(2))._copies
        assert sum(copy.values.numel() for copy in copies.values()) < 20, name

"""Losses: every reduction, weights, ignored targets, and torch's derivatives at the kinks."""

import pytest
import torch
import torch.nn.functional as F
from support import check, run_in_jax

REDUCTIONS = "none", "mean", "sum"


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Differences of zero, of exactly the width of each loss, and on either side of it.
X = f64(-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.3, 1.0)
Y = f64(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)


def test_regression():
    def functions(x, y):
        for reduction in REDUCTIONS:
            yield F.mse_loss(x, y, reduction=reduction)
            yield F.l1_loss(x, y, reduction=reduction)
            yield F.smooth_l1_loss(x, y, reduction=reduction)
            yield F.smooth_l1_loss(x, y, beta=0.5, reduction=reduction)
            yield F.smooth_l1_loss(x, y, beta=0.0, reduction=reduction)
            yield F.huber_loss(x, y, reduction=reduction)
            yield F.huber_loss(x, y, delta=0.5, reduction=reduction)
            yield F.huber_loss(x, y, reduction, 1.0, y + 2)  # pyright: ignore[reportCallIssue]

    check(lambda x, y: list(functions(x, y)), X, Y)


def test_binary_cross_entropy():
    """Saturated probabilities too: torch bounds logarithms and denominators."""
    p = f64(0.0, 0.0, 1.0, 1.0, 0.25, 0.5, 0.75)
    target = f64(0.0, 1.0, 0.0, 1.0, 0.5, 1.0, 0.0)

    def functions(p, target):
        return [F.binary_cross_entropy(p, target, reduction=reduction) for reduction in REDUCTIONS]

    check(functions, p, target, tolerance=1e-8)  # torch's 1e-12 is a float32
    weight = f64(1.0, 2.0, 3.0)
    check(lambda p, t: F.binary_cross_entropy(p, t, weight), p[4:], target[4:])


def test_binary_cross_entropy_of_logits():
    x, target = f64(-800.0, -2.0, 0.0, 0.0, 1.0, 800.0), f64(0.0, 1.0, 0.3, 1.0, 0.0, 1.0)
    weight = f64(1.0, 2.0, 3.0, 0.5, 0.0, 1.0)

    def functions(x, target):
        loss = F.binary_cross_entropy_with_logits
        for reduction in REDUCTIONS:
            yield loss(x, target, reduction=reduction)
            yield loss(x, target, weight, reduction=reduction, pos_weight=weight.flip(0))

    check(lambda x, target: list(functions(x, target)), x, target)


def test_classification():
    target = torch.tensor([0, 3, -100, 2, 1])
    weight = f64(1.0, 0.5, 2.0, 0.0)

    def functions(x):
        for reduction in REDUCTIONS:
            yield F.nll_loss(x, target, reduction=reduction)
            yield F.nll_loss(x, target.abs() % 4, weight, reduction=reduction, ignore_index=2)
            yield F.nll_loss(x[0], target[1], reduction=reduction)
            yield F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=0.1)
            yield F.cross_entropy(x, x.flip(0).softmax(1), weight, reduction=reduction)

    check(lambda x: list(functions(x)), randn(5, 4))


def test_classification_of_pixels():
    target = torch.tensor([[[0, 1], [2, -100]], [[2, 2], [1, 0]]])
    weight = f64(1.0, 0.5, 2.0)
    for reduction in REDUCTIONS:
        check(
            lambda x: (
                F.nll_loss(x, target, weight, reduction=reduction),  # noqa: B023
                F.cross_entropy(x[..., None], target[..., None], reduction=reduction),  # noqa: B023
            ),
            randn(2, 3, 2, 2),
        )


def test_nothing_but_ignored_targets():
    """The mean over nothing is NaN, and so is its gradient, as in torch."""
    target = torch.full((5,), -100)
    check(lambda x: F.nll_loss(x, target, reduction="sum"), randn(5, 4))
    check(lambda x: F.nll_loss(x, target), randn(5, 4), order=0)


def test_a_class_that_does_not_exist_gives_nan():
    """torch raises; a compiled program cannot."""
    x = randn(2, 4)
    losses = run_in_jax(lambda x, t: F.nll_loss(x, t, reduction="none"), x, torch.tensor([4, 1]))[0]
    assert losses[0] != losses[0]
    assert float(losses[1]) == float(-x[1, 1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_margins(reduction):
    """Margins that are met exactly included."""
    x, target = f64(0, 1, 2, -1, 0.5, 0.5, -0.5, 1).view(2, 4), torch.tensor([1, 3])
    labels, weight = torch.tensor([[1, 3, -1, 0], [2, -1, 2, -1]]), f64(1.0, 0.5, 2.0, 0.0)

    def functions(x):
        return (
            F.multi_margin_loss(x, target, reduction=reduction),
            F.multi_margin_loss(x, target, 2, 0.5, weight, reduction=reduction),
            F.multilabel_margin_loss(x, labels, reduction=reduction),
        )

    check(functions, x, order=1)

    def twice_differentiable(x, y):
        sign = torch.sign(x.detach() - 0.6)
        return (
            F.soft_margin_loss(x, sign, reduction=reduction),
            F.multilabel_soft_margin_loss(x, (sign > 0).double(), reduction=reduction),
            F.hinge_embedding_loss(x, sign, reduction=reduction),
            F.margin_ranking_loss(x, y, sign, margin=0.5, reduction=reduction),
            F.cosine_embedding_loss(x, y + 0.1, target - 2, margin=0.1, reduction=reduction),
            F.triplet_margin_loss(x, y + 0.1, 2 * x + 0.3, reduction=reduction),
        )

    check(twice_differentiable, x, x.flip(0))


def test_distributions():
    x, y = randn(3, 4).abs(), randn(3, 4, seed=1).abs()

    def functions(x, y):
        for reduction in REDUCTIONS:
            if reduction != "mean":  # torch warns that it is not the mean
                yield F.kl_div(x, y, reduction=reduction)
                yield F.kl_div(x, y, reduction=reduction, log_target=True)
            yield F.poisson_nll_loss(x, y.detach(), full=True, reduction=reduction)

    check(lambda x, y: list(functions(x, y)), x, y)
    check(lambda x: F.kl_div(x, f64(0.0, 1.0), reduction="batchmean"), f64(0.5, -1.0))


def test_ctc():
    """torch's derivative by the log-probabilities, which it takes to be normalised."""
    targets = torch.tensor([[1, 2, 3], [1, 1, 2], [3, 3, 3]])
    in_a_row = torch.tensor([1, 3, 3, 3, 1])
    lengths, target_lengths = torch.tensor([6, 5, 4]), torch.tensor([3, 0, 2])

    def functions(x):
        for reduction in REDUCTIONS:
            yield F.ctc_loss(x, targets, lengths, target_lengths, reduction=reduction)
            yield F.ctc_loss(x, in_a_row, lengths, target_lengths, 2, reduction=reduction)
        yield torch.ctc_loss(x.log_softmax(-1), in_a_row, (6, 5, 4), (3, 0, 2), 0, 2)  # sum
        yield torch.ctc_loss(x[:, 1], targets[1], (6,), (3,), 0, 0)  # none

    check(lambda x: list(functions(x)), randn(6, 3, 4), order=1)


def test_ctc_of_impossible_targets():
    """Three equal labels need two blanks between them: five steps."""
    targets, lengths = torch.tensor([[3, 3, 3]]), torch.tensor([3])

    def losses(x, zero_infinity):
        return F.ctc_loss(x, targets, torch.tensor([4]), lengths, 0, "none", zero_infinity)

    check(lambda x: losses(x, False), randn(6, 1, 4), order=0)
    check(lambda x: losses(x, True), randn(6, 1, 4), order=1)

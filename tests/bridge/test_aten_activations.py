"""Activation functions: at every kink the one-sided derivatives that torch has chosen."""

import torch
import torch.nn.functional as F
from support import check


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


X = f64(-100.0, -3.5, -3.0, -2.0, -1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 3.0, 6.0, 20.0, 100.0)


def test_piecewise_linear():
    def functions(x):
        return (
            (
                F.relu(x),
                F.relu6(x),
                F.hardtanh(x),
                F.hardtanh(x, -2.0, 0.5),
                F.threshold(x, 0.5, 7),
            ),
            (F.leaky_relu(x), F.leaky_relu(x, -0.5), F.rrelu(x), F.threshold(x, 0, -1)),
            (F.softshrink(x), F.softshrink(x, 0.0), F.hardshrink(x), F.hardshrink(x, 1.0)),
        )

    check(lambda x: [[(y + 1) ** 2 for y in group] for group in functions(x)], X)


def test_piecewise_curved():
    """elu: first derivative from the left at zero, second from the right."""

    def functions(x):
        return F.hardswish(x), F.elu(x), F.elu(x, 1.5), F.selu(x), F.celu(x), F.celu(x, 2.0)

    check(functions, X)
    check(F.hardsigmoid, X, order=1, tolerance=1e-7)  # torch's 1/6 is a float32


def test_smooth():
    def functions(x):
        return (
            (F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.mish(x), F.logsigmoid(x)),
            (F.sigmoid(x), F.tanh(x), F.softsign(x), F.tanhshrink(x)),
            (F.softplus(x), F.softplus(x, beta=3.0, threshold=5.0)),
        )

    check(functions, X)


def test_logsigmoid_and_softplus_where_exponentials_overflow():
    check(lambda x: (F.logsigmoid(x), F.softplus(x), F.elu(x)), f64(-800.0, 800.0))


def test_prelu():
    """Also at zero, where torch's mixed second derivative is zero."""
    check(F.prelu, X, f64(0.25))
    check(F.prelu, X[:12].view(2, 3, 2), f64(0.25, -0.5, 0.0))


def test_glu():
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check(lambda x: (F.glu(x), F.glu(x, 0)), x)


def test_in_place():
    def functions(x):
        names = "relu", "leaky_relu", "hardtanh", "elu", "celu", "silu", "mish", "hardswish"
        return [getattr(F, name)(x * 1, inplace=True) for name in names]

    check(functions, X)


def test_half_precision_is_rounded_once():
    def functions(x):
        return (
            (F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.softplus(x), F.elu(x)),
            (F.hardswish(x), F.leaky_relu(x, 0.1), F.hardtanh(x, -0.1, 0.1), F.mish(x)),
        )

    check(functions, torch.linspace(-4, 4, 33).bfloat16(), order=1)


def test_gradients_inside_the_callable():
    """torch.func.grad brings torch's own backward operations into the program."""

    def functions(x):
        def total(x):
            smooth = F.gelu(x) + F.silu(x) + F.logsigmoid(x) + F.elu(x) + F.softplus(x)
            kinked = F.relu(x) + F.leaky_relu(x) + F.hardtanh(x) + F.hardshrink(x) + F.softshrink(x)
            return (smooth + kinked + F.hardswish(x)).square().sum()

        return torch.func.grad(total)(x)

    check(functions, f64(-4.0, -1.3, -0.2, 0.4, 1.7, 4.5))

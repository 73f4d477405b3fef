"""Elementwise operations: torch's values, dtypes, and first and second derivatives everywhere."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import check

from jaxmeta_bridge import UnsupportedOpError, from_torch

INF, NAN = math.inf, math.nan


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def grid(*values):
    """Every pair of the values."""
    first, second = torch.meshgrid(f64(*values), f64(*values), indexing="ij")
    return first.flatten(), second.flatten()


REAL = f64(-100.0, -2.5, -1.0, -0.5, -1e-20, -0.0, 0.0, 1e-20, 0.25, 0.5, 1.0, 1.5, 3.3, 100.0)


def test_functions_on_the_real_line():
    def functions(x):
        return (
            (x.abs(), x.sign(), x.sgn(), x.neg(), x.frac(), x.positive(), x.square()),
            (x.ceil(), x.floor(), x.round(), x.trunc(), x.round(decimals=1)),
            (x.exp(), x.exp2(), x.expm1(), x.sigmoid(), x.deg2rad(), x.rad2deg()),
            (x.sin(), x.cos(), x.tan(), x.atan(), x.sinh(), x.cosh(), x.tanh(), x.asinh()),
            (x.signbit(), x.isnan(), x.isinf(), x.isfinite(), x.isposinf(), x.isneginf()),
            (x.angle(), x.nan_to_num(), x.logical_not(), x.frexp()),
        )

    check(functions, REAL)


def test_functions_of_positive_numbers():
    """Including the infinite derivatives at zero."""

    def functions(x):
        return x.sqrt(), x.rsqrt(), x.log(), x.log2(), x.log10(), x.log1p(), x.reciprocal()

    check(functions, f64(0.0, 1e-20, 0.5, 1.0, 2.0, 1e9))


def test_functions_of_the_unit_interval():
    def functions(x):
        return x.acos(), x.asin(), x.atanh(), x.erfinv(), (1 + x).acosh(), (x.abs() + 0.1).logit()

    check(functions, f64(-0.75, -0.25, 0.0, 0.25, 0.75))


def test_logit_clamps_its_argument():
    check(lambda p: p.logit(0.25), f64(0.1, 0.25, 0.5, 0.75, 0.9))
    check(lambda p: p.logit(), f64(0.0, 1.0), order=1)


def test_ties_at_halves_round_to_even():
    check(lambda x: (x.round(), (x * 100).round(decimals=-2)), f64(-2.5, -1.5, -0.5, 0.5, 1.5, 2.5))


def test_not_finite():
    """Values only: torch's derivatives at NaN are arbitrary."""

    def functions(x):
        return (
            (x.nan_to_num(), x.nan_to_num(1.0, 2.0, -3.0), x.sign(), x.isnan(), x.isposinf()),
            (x.abs(), x.frexp(), x.relu(), x.clamp(-1, 1), x.sgn(), x.frac(), x.ceil()),
            (torch.maximum(x, x.flip(0)), torch.fmax(x, x.flip(0)), torch.fmin(x, x.flip(0))),
        )

    check(functions, f64(-INF, -1.0, 0.0, NAN, INF), order=0)
    check(lambda x: x.nan_to_num(1.0, 2.0, -3.0), f64(-INF, -1.0, 0.0, NAN, INF))


def test_arithmetic():
    def functions(x, y):
        return (
            (x + y, x - y, x * y, torch.rsub(x, y), torch.add(x, y, alpha=3), x.sub(y, alpha=2)),
            (x / y, x.fmod(y), x.remainder(y)),
            [x.div(y, rounding_mode=mode) for mode in (None, "trunc", "floor")],
            (torch.atan2(x, y), torch.logaddexp(x, y), torch.logaddexp2(x, y)),
            (torch.copysign(x, y), torch.ldexp(x, y), torch.nextafter(x, y)),
            (torch.addcmul(x, y, y, value=2), torch.addcdiv(x, x, y, value=2)),
            (x * 2, x / 3, x + 2.5, 2 - x, x % 2, x.fmod(-2), 2 / y, torch.copysign(x, -2)),
        )

    check(functions, *grid(-3.0, -2.0, -0.5, 0.5, 1.0, 2.0, 7.0))


def test_quotients_round_down_exactly():
    """Below a whole number, although the rounded quotient is that number."""
    x, y = grid(-1.0, -0.3, -0.1, 0.1, 0.2, 0.3, 1.0, INF)
    check(lambda x, y: (x // y, x.remainder(y), x.div(y, rounding_mode="trunc")), x, y, order=0)
    check(lambda x: (x // 0.0, x % INF, x.remainder(-INF)), REAL, order=0)


def test_ties_of_extrema():
    """maximum halves the gradient, fmax gives it to the first."""

    def functions(x, y):
        return torch.maximum(x, y), torch.minimum(x, y), torch.fmax(x, y), torch.fmin(x, y)

    check(lambda x, y: [(z + 1) ** 2 for z in functions(x, y)], *grid(-1.0, 0.0, 2.0))


def test_at_the_origin():
    """hypot has no derivative there and torch's is NaN; that of atan2 is zero, by definition."""
    check(torch.hypot, *grid(-1.0, 0.0, 2.0))
    check(lambda x, y: (torch.atan2(x, y), torch.copysign(x, y)), *grid(-1.0, 0.0, 2.0), order=1)


@pytest.mark.parametrize("mode", ["tensor", "lower", "upper"])
def test_clamp_passes_the_gradient_at_its_bounds(mode):
    x = f64(-2.0, -1.0, 0.0, 1.0, 2.0)

    def clamp(x, lower, upper):
        if mode == "lower":
            return x.clamp(min=lower), x.clamp_min(-1)
        return (x.clamp(max=upper), x.clamp_max(-1)) if mode == "upper" else x.clamp(lower, upper)

    for lower, upper in ((-1.0, 1.0), (1.0, 1.0), (2.0, -1.0)):
        check(clamp, x, f64(lower), f64(upper))


def test_clamp_by_numbers():
    x = f64(-2.0, -1.0, 0.0, 1.0, 2.0)
    check(lambda x: (x.clamp(-1, 1), x.clamp(1, 1), x.clamp(2, -1), x.clamp(max=1)), x)
    check(lambda i: (i.clamp(0, 2), i.clamp(min=0.5), i.clamp_max(1)), x.int(), order=0)


EXPONENTS = (-3, -2, -1, 0, 1, 2, 3, -1.5, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


def test_power_of_numbers():
    """0**0, 0**1 and 0**2 have finite derivatives; negative bases have whole powers."""
    check(lambda x: [x**exponent for exponent in EXPONENTS], f64(0.0, 0.5, 1.0, 2.0))
    check(lambda x: [x**exponent for exponent in (-2, 0, 1.0, 2.0, 3, 9.0)], f64(-2.0, -0.5))


def test_power_of_tensors():
    base, exponent = grid(0.25, 0.5, 1.0, 2.0, 3.0)
    check(torch.pow, base, exponent)
    check(lambda x, y: x.pow(y), f64(0, 0, 0, 0), f64(0, 0.5, 1, 2), order=1)
    check(lambda x: x.pow(f64(0, 1, 2, 3)), f64(-2.0, 0.0, 0.0, 0.0))
    check(lambda y: (0.0**y, 1.0**y, 2.5**y, torch.float_power(3, y)), f64(0.0, 1.0, 2.0), order=1)
    integers = torch.tensor([-3, -1, 0, 1, 2])
    check(lambda i: (i**2, i**3, i.abs() ** i.flip(0), (-1) ** i, 2**i, i**0.5), integers, order=0)


def test_logarithms_of_zero_times_zero():
    def functions(x, y):
        return torch.xlogy(x, y), torch.special.xlog1py(x, y - 1), torch.xlogy(x, 0), x.xlogy(2)

    check(functions, f64(0.0, 0.0, 0.5, 2.0), f64(0.0, 2.0, 0.5, 3.0), order=1)
    check(functions, f64(0.0, 0.5, 2.0), f64(2.0, 0.5, 3.0))
    check(lambda y: (torch.xlogy(0.5, y), torch.xlogy(0, y)), f64(0.5, 3.0))


def test_lerp_takes_the_nearer_end():
    start, end = f64(0.0, 1e16, -1.0), f64(1.0, 1.0, 3.0)
    check(lambda a, b: [a.lerp(b, w) for w in (0.0, 0.3, 0.5, 0.7, 1.0, -2.0)], start, end)
    check(torch.lerp, start, end, f64(0.3, 0.5, 1.0))


def test_where_keeps_gradients_apart():
    """The branch that is not taken may be infinite."""
    x = f64(-1.0, 0.0, 1.0, 4.0)
    check(lambda x: (torch.where(x > 0, x, 0), torch.where(x > 0, 1.0, x**2)), x)
    check(lambda x: torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), x), x)
    check(
        lambda c, x, i: (torch.where(c, x, i), torch.where(c, i, 2.5)), x > 0, x, x.int(), order=1
    )


def test_comparisons_promote_as_torch():
    def functions(x, y):
        return x == y, x != y, x < y, x <= y, x > y, x >= y, x.logical_and(y)

    single, tenth = torch.tensor([0.1, 0.5]), f64(0.1)
    integers = torch.tensor([0, 1, 2**53 + 1])
    check(functions, single, tenth, order=0)  # against (0.1, 0.1): unequal in float64
    check(functions, single, tenth[0], order=0)  # a 0-d tensor does not widen: equal
    check(functions, integers, f64(2.0**53), order=0)
    check(functions, integers.int(), integers, order=0)
    check(lambda x: (x == 0.1, x > 0.1, x.half() == 0.1, x.half() < 1e-3), single, order=0)
    close = f64(1.0, 1.0, INF, NAN), f64(1.05, 1.2, INF, NAN)
    check(lambda x, y: x.isclose(y, rtol=0.1), *close, order=0)
    check(lambda i: (i > 0.5, i == 1, i < True, i.bool() == i), integers, order=0)


def test_logic_and_bits():
    i, j = (part.int() for part in grid(-100, -3, -1, 0, 1, 5, 40, 127))
    logic = torch.logical_and, torch.logical_or, torch.logical_xor

    def functions(i, j):
        return (
            (i & j, i | j, i ^ j, ~i, i << j, i >> j, i << 2, i >> 1, i & 3, 5 | i, 2 << j),
            [function(i, j) for function in logic],
            (i.gcd(j), i.lcm(j), i.abs(), -i, i.sign(), i.signbit()),
        )

    check(functions, i.to(torch.int8), j.to(torch.int8), order=0)
    check(functions, i.long(), j.long(), order=0)
    booleans = (i.bool(), j.bool())
    check(lambda a, b: (a & b, a | b, a ^ b, ~a, a + b, a * b, a & True), *booleans, order=0)


def test_integers_become_floats_where_torch_says():
    integers = torch.tensor([-7, -2, 1, 3, 10])

    def functions(i):
        return (
            (
                i + i,
                i * 2,
                i * 2.5,
                i / 2,
                i / i,
                i // 3,
                i % 3,
                i.fmod(3),
                2 - i,
                7 // i,
                i + True,
            ),
            (
                i.exp(),
                i.sigmoid(),
                i.reciprocal(),
                i.atan2(i),
                i.abs().sqrt(),
                i.sin(),
                i.bool() * 3,
            ),
            (i.ceil(), i.round(), i.trunc(), i.floor(), i.square(), i.deg2rad(), i.erf()),
            (
                torch.addcmul(i, i, i, value=2),
                i.div(3, rounding_mode="trunc"),
                i.maximum(i.flip(0)),
            ),
        )

    check(functions, integers, order=0)
    check(functions, integers.to(torch.int16), order=0)
    check(lambda i: (i.ceil(), i.floor(), i.trunc()), torch.tensor([2**62 + 1]), order=0)
    check(lambda i: torch.add(i, i, alpha=-3), torch.tensor([1, 100], dtype=torch.uint8), order=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """The intermediate results stay in float32, so every bit is torch's."""
    x = torch.linspace(-3, 3, 97).to(dtype)

    def functions(x):
        y = x.flip(0) + 0.3
        return (
            (x * 0.1, x + 0.1, x / 3, x * y, x / y, torch.add(x, y, alpha=0.3), x.lerp(y, 0.3)),
            (torch.addcmul(x, y, y, value=0.7), torch.addcdiv(x, x, y, value=0.7)),
            (x.div(y, rounding_mode="trunc"), x // y, x.clamp(-0.1, 0.1), x.square()),
        )

    check(functions, x, order=0, tolerance=0)
    check(lambda x: (x.sigmoid(), x.tanh(), x.exp(), x.sin(), x.sqrt(), x.erf()), x, order=1)


def test_casts():
    x = f64(-2.7, -0.5, 0.0, 0.5, 2.7)
    check(lambda x: (x.float(), x.half().double(), x.bfloat16(), x.to(torch.complex128)), x)
    check(lambda x: (x.int(), x.bool(), x.long().double(), x.type_as(x.char()), x), x)
    integers = torch.tensor([-3, 0, 300])
    check(lambda i: (i.double() / 3, i.bool(), i.byte(), i.to(torch.int8)), integers)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_cast_of_complex_to_real():
    check(lambda z: z.double(), torch.tensor([1 + 2j, -3j], dtype=torch.complex128))


def test_complex_numbers():
    x, y = grid(-1.5, 0.5, 2.0)

    def functions(z, w):
        return (
            (z.conj(), z.real, z.imag, z.abs(), z.angle(), z.sgn(), torch.view_as_real(z * w)),
            (z + w, z * w, z / w, z * 2, z.conj() * w, z.exp(), z.log(), z.sqrt(), z.sin(), z**2),
            (z.conj().imag, z.resolve_conj(), torch.logaddexp(z, w), z.reciprocal(), z.tanh()),
            (torch.view_as_complex(torch.stack([z.real, w.imag], -1)), z == w, z.isnan()),
        )

    check(functions, torch.complex(x, y), torch.complex(y.flip(0), x) + 3)
    check(
        lambda x, y: (torch.complex(x, y), torch.polar(x.abs() + 1, y), x * torch.tensor(1j)), x, y
    )
    check(lambda z: (z.abs(), z.abs() ** 2), torch.zeros(2, dtype=torch.complex128))
    check(lambda z: (z.sgn(), z.angle()), torch.zeros(2, dtype=torch.complex128), order=1)


def test_special_functions():
    special = torch.special

    def on_the_line(x):
        return (
            (x.erf(), x.erfc(), special.erfcx(x), special.ndtr(x), special.log_ndtr(x)),
            (x.i0(), special.i0e(x), special.i1(x), special.i1e(x), (x + 0.1).sinc()),
            (x.sigmoid().logit(), special.ndtri(x.sigmoid()), special.expit(x)),
        )

    check(on_the_line, f64(-3.0, -1.0, -0.25, 0.0, 0.5, 2.0))

    def of_positive_numbers(x):
        return (
            (x.lgamma(), x.digamma(), special.entr(x), (x + 2).mvlgamma(3)),
            [x.polygamma(order) for order in range(4)],
        )

    check(of_positive_numbers, f64(0.25, 0.5, 1.0, 2.5, 20.0), tolerance=1e-8)
    check(
        lambda x: (x.lgamma(), x.digamma(), x.polygamma(2), x.polygamma(3)),
        f64(-20.75, -8.3, -2.5, -0.25),
        tolerance=1e-8,  # torch's own trigamma is no better
    )

    def of_one_argument(x):
        a = f64(0.5, 1.0, 3.0)
        return special.gammainc(a, x), special.gammaincc(a, x), special.zeta(a + 1.5, x)

    check(of_one_argument, f64(0.5, 2.0, 4.0))
    zeta, q = from_torch(special.zeta), jnp.full(2, 2.0)
    with pytest.raises(UnsupportedOpError, match="zeta"):
        jax.grad(lambda x: zeta(x, q).sum())(q)
    check(lambda x: special.entr(x), f64(-1.0, 0.0), order=0)
    check(torch.heaviside, *grid(-1.0, 0.0, 2.0), order=0)


@pytest.mark.parametrize("shapes", [((2, 1, 3), (4, 1)), ((), (3,)), ((), ()), ((0, 3), (3,))])
def test_shapes(shapes):
    """Broadcasting, 0-d and empty tensors."""
    x, y = (torch.rand(shape, dtype=torch.float64) + 0.5 for shape in shapes)

    def functions(x, y):
        return (
            (x + y, x / y, x.pow(y), torch.maximum(x, y), torch.where(x > y, x, y), x.atan2(y)),
            (torch.hypot(x, y), torch.addcmul(x, y, y), torch.lerp(x, y, 0.3), x.clamp(y, y + 1)),
            (x.exp(), x.abs(), torch.xlogy(x, y), x.fmod(y), torch.copysign(x, y)),
        )

    check(functions, x, y)


def test_given_derivatives_under_every_transformation(x64):
    """Forward over reverse, reverse over forward, twice forward, batched and compiled."""

    def function(x):
        return (torch.hypot(x, x + 1) + x.rsqrt() + torch.logaddexp(x, -x) + x.pow(x)).sum()

    x = f64(0.5, 1.0, 2.0).requires_grad_()
    (slope,) = torch.autograd.grad(function(x), x, create_graph=True)
    (expected,) = torch.autograd.grad(slope.sum(), x)
    f, points = from_torch(function), jnp.asarray(x.detach().numpy())
    for second in (jax.hessian(f), jax.jacrev(jax.jacfwd(f)), jax.jacfwd(jax.jacfwd(f))):
        np.testing.assert_allclose(jax.jit(jax.vmap(second))(points), expected, rtol=1e-9)

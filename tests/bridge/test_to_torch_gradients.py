"""Derivatives through to_torch against finite differences, native torch and closed forms."""

import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from jaxmeta_bridge.to_torch import to_torch

assert_exact = functools.partial(assert_close, rtol=1e-10, atol=1e-12)

# Of torch itself, where it transforms or checks an autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def jax_network(params, x, labels):
    hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
    logits = hidden @ params["out"]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -picked.mean(), {"hidden": hidden, "guess": logits.argmax(1)}


def torch_network(params, x, labels):
    hidden = torch.tanh(x @ params["in"]["w"] + params["in"]["b"])
    logits = hidden @ params["out"]
    picked = torch.log_softmax(logits, 1).gather(1, labels[:, None])
    return -picked.mean(), {"hidden": hidden, "guess": logits.argmax(1)}


def jax_loop(x, w):
    return jax.lax.scan(lambda c, row: (jnp.sin(c * w) + row, c), x[0], x[1:])


def torch_loop(x, w):
    carry, stacked = x[0], []
    for row in x[1:]:
        stacked.append(carry)
        carry = torch.sin(carry * w) + row
    return carry, torch.stack(stacked)


PARAMS = {"in": {"w": normal(3, 4), "b": normal(4)}, "out": normal(4, 2)}
LABELS = torch.tensor([0, 1, 1, 0, 1])

# A JAX function, the same in torch, and arguments.
CASES: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "network": (jax_network, torch_network, (PARAMS, normal(5, 3), LABELS)),
    "loop": (jax_loop, torch_loop, (normal(4, 2), normal(2))),
    "0-d": (lambda x, y: jnp.exp(x) * y**2, lambda x, y: x.exp() * y**2, (normal(), normal())),
    "result is an input": (
        lambda x, y: (x, x * y),
        lambda x, y: (x, x * y),
        (normal(3), normal(3)),
    ),
    "result twice": (
        lambda x: (lambda y: (y, y * 2, y))(jnp.exp(x)),
        lambda x: (lambda y: (y, y * 2, y))(x.exp()),
        (normal(3),),
    ),
    "a number": (lambda x, s: x**3 * s, lambda x, s: x**3 * s, (normal(3), 2.5)),
    "no dependence": (
        lambda x, y: (x * x, jnp.arange(3.0)),
        lambda x, y: (x * x, torch.arange(3.0)),
        (normal(3), normal(2)),
    ),
    "views": (
        lambda x, y, z: jnp.sin(x) @ y * z,
        lambda x, y, z: torch.sin(x) @ y * z,
        (normal(4, 3).T, normal(4, 6)[:, ::2], normal(3, 4).mT[:3]),
    ),
}


def differentiable(tree: Any) -> list[torch.Tensor]:
    return [t for t in jax.tree.leaves(tree) if isinstance(t, torch.Tensor) and t.requires_grad]


def flat(function: Any, arguments: Any) -> tuple[Any, list[torch.Tensor]]:
    """`function` of the differentiable tensors among its arguments, and its results so."""
    leaves, tree = jax.tree.flatten(arguments)
    chosen = [isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves]

    def of_tensors(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = iter(tensors)
        merged = [next(rest) if c else leaf for leaf, c in zip(leaves, chosen, strict=True)]
        results = jax.tree.leaves(function(*tree.unflatten(merged)))
        return tuple(result for result in results if result.is_floating_point())

    return of_tensors, differentiable(arguments)


def project(tensors: Any) -> torch.Tensor:
    return sum(
        ((t * normal(*t.shape, seed=i).detach()).sum() for i, t in enumerate(tensors)),
        torch.zeros(()),
    )


@pytest.mark.parametrize("name", CASES)
def test_values_and_two_gradients_are_those_of_torch(name):
    jax_function, torch_function, arguments = CASES[name]
    results = []
    for function in (to_torch(jax_function), torch_function):
        values = function(*arguments)
        tensors = differentiable(arguments)
        first = torch.autograd.grad(
            project(differentiable(values)), tensors, create_graph=True, materialize_grads=True
        )
        second = torch.autograd.grad(
            project(t for t in first if t.requires_grad), tensors, materialize_grads=True
        )
        results.append((jax.tree.leaves(values), first, second))
    for ours, theirs in zip(*results, strict=True):
        assert len(ours) == len(theirs) > 0
        for tensor, expected in zip(ours, theirs, strict=True):
            if expected.dtype is torch.float64:
                assert_exact(tensor, expected)
            else:
                assert_close(tensor.to(expected.dtype), expected)


@pytest.mark.parametrize("name", CASES)
def test_finite_differences(name):
    jax_function, _, arguments = CASES[name]
    function, tensors = flat(to_torch(jax_function), arguments)
    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True)


COMPLEX = {
    "holomorphic": lambda z, w: jnp.exp(z) * w,
    "conjugate": lambda z, w: jnp.conj(z) * w**2,
    "real result": lambda z, w: jnp.abs(z * w) ** 2,
    "mixed": lambda z, w: (jnp.real(z) * w, jnp.angle(w), z.imag),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_finite_differences(name):
    z, w = normal(3, dtype=torch.complex128), normal(3, dtype=torch.complex128, seed=1)
    function = to_torch(COMPLEX[name])
    assert gradcheck(function, (z, w), check_forward_ad=True)
    assert gradgradcheck(function, (z, w))


def test_complex_gradients_follow_torchs_convention():
    for jax_function, torch_function in [
        (lambda z: jnp.sum(jnp.exp(z) * (1 + 2j)).real, lambda z: (z.exp() * (1 + 2j)).sum().real),
        (lambda z: jnp.sum(jnp.abs(z) ** 3), lambda z: (z.abs() ** 3).sum()),
    ]:
        z = normal(4, dtype=torch.complex128)
        ours, theirs = (
            torch.autograd.grad(f(z), z)[0] for f in (to_torch(jax_function), torch_function)
        )
        assert ours.imag.abs().max() > 0.1
        assert_exact(ours, theirs)


def test_third_and_fourth_order():
    function = to_torch(lambda x: jnp.sum(jnp.sin(x) * x**2))
    x = normal(5)
    derivative = function(x)
    s, c, v = torch.sin(x), torch.cos(x), x
    for expected in [
        c * v**2 + 2 * s * v,
        -s * v**2 + 4 * c * v + 2 * s,
        -c * v**2 - 6 * s * v + 6 * c,
        s * v**2 - 8 * c * v - 12 * s,
    ]:
        (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
        assert_exact(derivative, expected)


# ---------------------------------------------------------------- autograd's rules


def test_only_what_is_wanted_is_computed():
    @jax.custom_vjp
    def not_differentiable(y):
        return y * 2

    def backward(_, cotangent):
        raise AssertionError("the gradient of y is computed")

    not_differentiable.defvjp(lambda y: (y * 2, None), backward)
    function = to_torch(lambda x, y: jnp.sum(x**2 * not_differentiable(y)))
    x, y = normal(3), normal(3).detach()
    function(x, y).backward()
    assert_close(x.grad, 4 * x.detach() * y)
    assert y.grad is None


def test_subsets_of_the_inputs():
    function = to_torch(lambda x, y, z: jnp.sum(x * y**2 * z**3))
    x, y, z = normal(3), normal(3, seed=1), normal(3, seed=2)
    result = function(x, y, z)
    for wanted in ([x], [y], [z], [z, x], [x, y, z]):
        closed = {id(x): y**2 * z**3, id(y): 2 * x * y * z**3, id(z): 3 * x * y**2 * z**2}
        gradients = torch.autograd.grad(result, wanted, retain_graph=True)
        for tensor, gradient in zip(wanted, gradients, strict=True):
            assert_exact(gradient, closed[id(tensor)])


def test_integer_results_are_not_differentiable():
    index, mask, value = to_torch(lambda x: (x.argmax(), x > 0, x * 2))(normal(3))
    assert not index.requires_grad
    assert not mask.requires_grad
    assert value.requires_grad


def test_no_grad_records_nothing():
    function = to_torch(lambda x: x**2)
    x = normal(3)
    with torch.no_grad():
        assert not function(x).requires_grad
    with torch.inference_mode():
        assert_close(function(x), x.detach() ** 2)
    assert not function(x.detach()).requires_grad


def test_unused_results_count_as_zero():
    x = normal(3)
    first, _second = to_torch(lambda x: (x**2, jnp.exp(x)))(x)
    first.sum().backward()
    assert_close(x.grad, 2 * x.detach())


def test_between_torch_operations():
    function = to_torch(lambda x, y: jnp.sin(x) @ y)

    def chain(function):
        x, y = normal(4, 3), normal(2, 3)
        z = function((x * 2).relu().T[1:], y.exp().sum().expand(4, 2)).cumsum(0)
        (z**2).mean().backward()
        return x.grad, y.grad

    for ours, theirs in zip(chain(function), chain(lambda x, y: x.sin() @ y), strict=True):
        assert_exact(ours, theirs)


def test_the_graph_is_freed_unless_retained():
    function = to_torch(lambda x: jnp.sum(jnp.exp(x)))
    x = normal(3)
    result = function(x)
    result.backward(retain_graph=True)
    result.backward()
    assert_close(x.grad, 2 * x.detach().exp())  # accumulated
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        result.backward()


def test_residuals_are_freed_with_the_graph():
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(weakref.ref(tensor))
        return tensor

    x = normal(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = to_torch(lambda x: jnp.sum(jnp.sin(x) * jnp.exp(x)))(x)
    assert sum(ref() is x for ref in kept) == 1
    assert len([ref for ref in kept if ref() is not None]) > 1
    result.backward()
    assert [ref() for ref in kept if ref() is not None] == [x]
    assert result.requires_grad  # the graph's own node is still there


def test_changes_in_place_are_noticed():
    x, y = normal(3), normal(3).detach()
    result = to_torch(lambda x, y: jnp.sum(x * y))(x, y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()
    # exp keeps its own result for the backward pass.
    result = to_torch(jnp.exp)(x)
    result.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
    # sin does not, so there the change is part of the graph like any other.
    result = to_torch(jnp.sin)(x)
    result.mul_(2)
    assert_close(torch.autograd.grad(result.sum(), x)[0], 2 * x.cos())


def test_keys_among_the_residuals():
    layer = jax.checkpoint(lambda x, key: jnp.sin(x) * jax.random.normal(key, x.shape, x.dtype))

    def function(x, key):
        for part in jax.random.split(key, 3):
            x = layer(x, part)
        return jnp.sum(x)

    x = normal(3)
    assert gradcheck(to_torch(lambda x: function(x, jax.random.key(0))), x)
    keyed = to_torch(function)
    assert gradcheck(lambda x: keyed(x, jax.random.key(0)), x)
    assert gradgradcheck(lambda x: keyed(x, jax.random.key(0)), x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_torchs_checkpoint(reentrant):
    function = to_torch(lambda x, w: jnp.sin(x) * w)
    x, w = normal(3), normal(3, seed=1)
    result = checkpoint(lambda x, w: function(function(x, w), w), x, w, use_reentrant=reentrant)
    assert isinstance(result, torch.Tensor)
    ours = torch.autograd.grad(result.sum(), (x, w)) if not reentrant else None
    if ours is None:  # the reentrant kind knows backward() only
        result.sum().backward()
        ours = (x.grad, w.grad)
    theirs = torch.autograd.grad(((x.sin() * w).sin() * w).sum(), (x, w))
    assert_close(ours, theirs)

"""`optax_from_torch`: torch optimizers where JAX programs expect optax transformations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

from jaxmeta import ArgumentKeyError, ArgumentTypeError, ArgumentValueError, meta_unroll
from jaxmeta_bridge import from_torch
from jaxmeta_bridge.optim import optax_from_torch

STEPS = 4


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def batches() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((STEPS, 5, 3))


def torch_steps(net: nn.Module, optimizer: torch.optim.Optimizer, xs: Any) -> None:
    for x in xs:
        optimizer.zero_grad()
        (net(torch.tensor(x)) ** 2).mean().backward()
        optimizer.step()


def jax_loss(net: nn.Module) -> Any:
    f = from_torch(net)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return (f(params, f.buffers, x)[0] ** 2).mean()

    return loss


def assert_same(params: Any, net: nn.Module, rtol: float = 1e-10) -> None:
    for name, parameter in net.named_parameters():
        np.testing.assert_allclose(params[name], parameter.detach().numpy(), rtol=rtol)


def two_groups(net: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        [{"params": net[2].parameters(), "lr": 0.1}, {"params": [net[0].weight]}],
        lr=torch.tensor(0.02, dtype=torch.float64),
        weight_decay=0.1,
    )


@pytest.mark.usefixtures("x64")
def test_groups_state_and_parameters_left_out():
    net = model()
    net[2].bias.requires_grad_(False)
    optimizer = two_groups(net)
    torch_steps(net, optimizer, batches())
    ours: Any = optax_from_torch(optimizer, net)
    params = from_torch(net).params
    loss = jax_loss(net)
    state = ours.init(params)
    assert state["0.bias"] == state["2.bias"] == {}
    assert state["2.weight"]["step"] == STEPS
    more = batches() + 1
    out = meta_unroll(loss, ours, params, more)
    torch_steps(net, optimizer, more)
    assert_same(out.params, net)
    # What torch did since does not reach it.
    again = meta_unroll(loss, ours, params, more)
    assert_same(again.params, net)


@pytest.mark.usefixtures("x64")
def test_continues_from_its_own_state():
    net = model()
    ours: Any = optax_from_torch(two_groups(net), net)
    params = from_torch(net).params
    loss, xs = jax_loss(net), batches()
    whole = meta_unroll(loss, ours, params, xs)
    half = meta_unroll(loss, ours, params, xs[:2])
    rest = meta_unroll(loss, ours, half.params, xs[2:], opt_state=half.opt_state)
    for name, value in whole.params.items():
        np.testing.assert_allclose(rest.params[name], value, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_hypergradients_of_options_by_group_and_by_parameter():
    net = model()
    optimizer = torch.optim.SGD(
        [{"params": net[0].parameters()}, {"params": net[2].parameters()}], lr=0.1, momentum=0.5
    )
    ours: Any = optax_from_torch(optimizer, net)
    params = from_torch(net).params
    loss, xs = jax_loss(net), batches()

    def make(h: Any) -> Any:
        return ours.with_options(**h)

    def meta_loss(h: Any) -> jax.Array:
        return meta_unroll(loss, make, params, xs, hyperparams=h).losses[-1]

    rates = {name: jnp.full(value.shape, 0.1) for name, value in params.items()}
    h = {"lr": rates, "momentum": [0.5, 0.0], "weight_decay": 0.0}
    slopes = jax.jit(jax.grad(meta_loss))(h)

    def moved(change: Any, width: float) -> jax.Array:
        return meta_loss(jax.tree.map(lambda a, b: a + width * b, h, change))

    def differ(change: Any) -> jax.Array:
        return (moved(change, 1e-6) - moved(change, -1e-6)) / 2e-6

    flat, tree = jax.tree.flatten(h)
    for i, slope in enumerate(jax.tree.leaves(slopes)):
        ones = [jnp.ones_like(jnp.asarray(v)) * (i == j) for j, v in enumerate(flat)]
        np.testing.assert_allclose(slope.sum(), differ(tree.unflatten(ones)), rtol=1e-6)
        assert (slope != 0).all()


@pytest.mark.usefixtures("x64")
def test_class_on_any_tree_chain_vmap_and_jit():
    ours: Any = optax.chain(
        optax.scale(2.0), optax_from_torch(torch.optim.AdamW, lr=0.1, weight_decay=0.2)
    )
    params = {"a": [jnp.arange(1.0, 4.0)], "b": jnp.ones((3, 2))}
    xs = jnp.arange(1.0, 4.0)

    def run(x: jax.Array, params: Any) -> Any:
        state = ours.init(params)
        for _ in range(2):
            grads = jax.tree.map(lambda p: x * p, params)
            updates, state = ours.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    batched = jax.jit(jax.vmap(run, in_axes=(0, None)))(xs, params)
    tensors = [torch.arange(1.0, 4.0).double(), torch.ones(3, 2).double()]
    for i, x in enumerate((1.0, 2.0, 3.0)):
        own = [tensor.clone() for tensor in tensors]
        optimizer = torch.optim.AdamW(own, lr=0.1, weight_decay=0.2)
        for _ in range(2):
            for tensor in own:
                tensor.grad = 2 * x * tensor
            optimizer.step()
        for actual, expected in zip(jax.tree.leaves(batched), own, strict=True):
            np.testing.assert_allclose(actual[i], expected.numpy(), rtol=1e-12)


def test_traced_options_of_a_class():
    def last(momentum: jax.Array) -> jax.Array:
        ours: Any = optax_from_torch(torch.optim.SGD, lr=0.1, momentum=momentum, nesterov=True)
        params = jnp.ones(2)
        state = ours.init(params)
        for _ in range(3):
            updates, state = ours.update(params, state, params)
            params = params + updates
        return params.sum()

    slope = jax.grad(last)(0.0)
    difference = (last(jnp.float32(0.01)) - last(jnp.float32(-0.01))) / 0.02
    np.testing.assert_allclose(slope, difference, rtol=1e-3)


def test_update_is_small_beside_a_large_parameter():
    """The update is computed as such, not as a difference of parameters."""
    ours: Any = optax_from_torch(torch.optim.SGD, lr=1e-3)
    params = jnp.full(2, 1e6)
    updates, _ = ours.update(jnp.ones(2), ours.init(params), params)
    np.testing.assert_allclose(updates, -1e-3, rtol=1e-6)


def test_dtypes_of_updates_and_state_stay_under_x64():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(2, jnp.float32), "v": jnp.ones(2, jnp.bfloat16)}
        ours: Any = optax_from_torch(torch.optim.NAdam, lr=jnp.float64(0.1))
        state = ours.init(params)
        updates, after = ours.update(params, state, params)
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)  # noqa: E731
    assert dtypes(updates) == dtypes(params)
    assert dtypes(after) == dtypes(state)


def test_names_from_torch_or_a_list():
    net = model().float()
    named = torch.optim.SGD(net.named_parameters(), momentum=0.9, lr=0.1)
    plain = torch.optim.SGD(net.parameters(), momentum=0.9, lr=0.1)
    for optimizer in (named, plain):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    params = from_torch(net).params
    for ours in (optax_from_torch(named), optax_from_torch(plain, list(params))):
        state: Any = ours.init(params)
        np.testing.assert_allclose(state["0.bias"]["momentum_buffer"], 1.0)
        assert state["0.bias"]["started"]


def test_flags_and_numpy_numbers_as_options():
    params = {"w": jnp.ones((3, 2))}
    given: list[dict[str, Any]] = [
        {"adjust_lr_fn": "match_rms_adamw"},
        {"lr": np.float64(0.1)},
        {"ns_steps": 2},
    ]
    for options in given:
        ours: Any = optax_from_torch(torch.optim.Muon).with_options(**options)
        updates, _ = ours.update(params, ours.init(params), params)
        other: Any = optax_from_torch(torch.optim.Muon, **options)
        np.testing.assert_array_equal(
            updates["w"], other.update(params, other.init(params), params)[0]["w"]
        )


def test_errors():
    net = model().float()
    params, optimizer = from_torch(net).params, torch.optim.SGD(net.parameters(), lr=0.1)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.Adam(net.parameters())
    adam.step()
    with pytest.raises(ArgumentValueError, match="LBFGS"):
        optax_from_torch(torch.optim.LBFGS)
    with pytest.raises(ArgumentTypeError, match="optimizer is a Sequential"):
        optax_from_torch(net)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentTypeError, match="names is given with the class SGD"):
        optax_from_torch(torch.optim.SGD, net)
    with pytest.raises(ArgumentKeyError, match="no option 'beta'.*lr, dampening"):
        optax_from_torch(optimizer, net, beta=1.0)
    with pytest.raises(ArgumentValueError, match="lr is a list of 2.*1 parameter groups"):
        optax_from_torch(optimizer, net).with_options(lr=[0.1, 0.2])
    with pytest.raises(ArgumentKeyError, match="lr has no value for the parameter '0.bias'"):
        optax_from_torch(optimizer, net, lr={"0.weight": 0.1}).init(params)
    with pytest.raises(ArgumentValueError, match="Linear that lacks 2"):
        optax_from_torch(optimizer, net[0])
    with pytest.raises(ArgumentValueError, match="names has 1 different names; .* holds 4"):
        optax_from_torch(optimizer, ["w"])
    with pytest.raises(ArgumentValueError, match="pass the module"):
        optax_from_torch(adam)
    with pytest.raises(ArgumentValueError, match="params is None; SGD"):
        optax_from_torch(optimizer, net).update(params, {})
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optax_from_torch(torch.optim.SGD, lr=-1.0)
    with pytest.raises(ArgumentValueError, match=r"'0.bias'.* needs exp_avg of shape \(9,\)"):
        optax_from_torch(adam, net).init(params | {"0.bias": jnp.ones(9)})

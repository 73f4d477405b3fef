"""A toy problem whose hypergradients are known, with a torch module and torch's autograd."""

import jax.numpy as jnp
import numpy as np
import optax
import torch

import jaxmeta
from jaxmeta_bridge import from_torch, to_torch


def test_worked_example_in_torch_without_any_jax_setting() -> None:
    assert jnp.asarray(np.float64(1)).dtype == jnp.float32  # JAX's x64 mode is off
    torch.manual_seed(3)
    module = torch.nn.Linear(1, 1, bias=False).double()
    x = np.random.RandomState(1).random_sample((100, 1))
    f = from_torch(module)

    def unroll(params, lr, momentum, batch):
        def loss_fn(params, batch):
            inputs, targets = batch
            return jnp.mean((f(params, {}, inputs)[0] - targets) ** 2)

        out = jaxmeta.meta_unroll(
            loss_fn,
            lambda h: optax.sgd(h["lr"][0], momentum=h["momentum"][0]),
            params,
            batch=batch,
            num_steps=5,
            hyperparams={"lr": lr, "momentum": momentum},
            trajectory=True,
        )
        meta_loss = jnp.sum((out.params["weight"] - 3.5) ** 2)
        return meta_loss, out.trajectory["weight"]

    lr = torch.tensor([0.3], requires_grad=True)
    momentum = torch.tensor([0.5], requires_grad=True)
    batch = (torch.from_numpy(x), torch.from_numpy(3.5 * x))
    params = dict(module.named_parameters())
    meta_loss, weights = to_torch(unroll)(params, lr, momentum, batch)
    meta_loss.backward()

    assert meta_loss.dtype == torch.float64
    np.testing.assert_allclose(
        weights.detach().flatten(),
        [-0.9915, -0.1217, 1.0145, 2.0640, 2.8668, 3.3908],
        atol=5e-5,
    )
    np.testing.assert_allclose(meta_loss.item(), 0.0119279879829, rtol=1e-11)
    assert lr.grad is not None and momentum.grad is not None and module.weight.grad is not None
    assert lr.grad.dtype == momentum.grad.dtype == torch.float32 and lr.grad.shape == (1,)
    np.testing.assert_allclose(lr.grad.item(), -1.6295, atol=5e-5)
    np.testing.assert_allclose(momentum.grad.item(), -0.9496, atol=5e-5)
    np.testing.assert_allclose(module.weight.grad.item(), -0.0053, atol=5e-5)

    # The weight's gradient once more, as a difference of the meta-loss.
    step = 1e-6
    up, down = (
        to_torch(unroll)({"weight": params["weight"].detach() + d}, lr, momentum, batch)[0].item()
        for d in (step, -step)
    )
    np.testing.assert_allclose(module.weight.grad.item(), (up - down) / (2 * step), rtol=1e-6)
    np.testing.assert_allclose((up - down) / (2 * step), -0.005311, atol=5e-7)

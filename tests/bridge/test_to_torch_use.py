"""to_torch under torch.func, in torch's training loops, and around jaxmeta itself."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import jaxmeta
from jaxmeta_bridge import from_torch
from jaxmeta_bridge.to_torch import to_torch

assert_exact = functools.partial(assert_close, rtol=1e-10, atol=1e-12)

# Of torch itself, where it transforms an autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


OURS = to_torch(lambda x: jnp.sum(jnp.sin(x) * x**2))


def native(x: torch.Tensor) -> torch.Tensor:
    return (torch.sin(x) * x**2).sum()


TRANSFORMATIONS = {
    "grad": grad,
    "hessian": hessian,
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "third": lambda f: hessian(lambda x: grad(f)(x).sum()),
    "jvp": lambda f: lambda x: jvp(f, (x,), (torch.cos(x),)),
    "jvp of grad": lambda f: lambda x: jvp(grad(f), (x,), (torch.cos(x),)),
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.tensor(2.0, dtype=x.dtype)),
}
BATCHED = {
    "vmap": vmap,
    "chunks": lambda f: vmap(f, chunk_size=2),
    "in_dims": lambda f: vmap(f, in_dims=1),
    "vmap of grad": lambda f: vmap(grad(f)),
    "vmap of hessian": lambda f: vmap(hessian(f)),
    "vmap of vmap": lambda f: vmap(vmap(f)),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(x).prod()),
    "vmap of jvp": lambda f: vmap(lambda x: jvp(f, (x,), (x * 2,))),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations(name):
    x = normal(4)
    assert_exact(TRANSFORMATIONS[name](OURS)(x), TRANSFORMATIONS[name](native)(x))


@pytest.mark.parametrize("name", BATCHED)
def test_batches(name):
    x = normal(3, 4)
    assert_exact(BATCHED[name](OURS)(x), BATCHED[name](native)(x))


def test_batches_of_some_inputs_and_trees():
    function = to_torch(lambda p, s, flag: {"a": p["x"] @ p["w"] * s, "n": 1.0, "flag": flag})
    x, w = normal(3, 4), normal(3, 2)
    result = vmap(lambda x, w: function({"x": x, "w": w}, 2.0, True), in_dims=(1, None))(x, w)
    assert_exact(result["a"], 2 * x.T @ w)
    assert result["n"].tolist() == [1, 1, 1, 1]
    assert result["flag"].all()


def test_gradients_of_a_batch_by_ordinary_backward():
    function = to_torch(lambda x, w: jnp.sum(jnp.sin(x) * w**2))
    w, x = normal(3).requires_grad_(), normal(5, 3)
    vmap(lambda row: function(row, w))(x).sum().backward()
    assert_exact(w.grad, (x.sin() * 2 * w.detach()).sum(0))


def test_forward_mode_without_torch_func():
    x, tangent = normal(3), normal(3, seed=1)
    with forward_ad.dual_level():
        value, index = to_torch(lambda x: (jnp.exp(x), x.argmax()))(
            forward_ad.make_dual(x, tangent)
        )
        assert_exact(forward_ad.unpack_dual(value).tangent, x.exp() * tangent)
        assert forward_ad.unpack_dual(index).tangent is None
        # What carries no tangent gets none.
        plain = to_torch(lambda x, y: (x * 2) * y)(x, forward_ad.make_dual(x, tangent))
        assert_exact(forward_ad.unpack_dual(plain).tangent, 2 * x * tangent)


def test_forward_over_reverse_without_torch_func():
    x, tangent = normal(3).requires_grad_(), normal(3, seed=1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        (first,) = torch.autograd.grad(OURS(dual), dual, create_graph=True)
        ours = forward_ad.unpack_dual(first).tangent
    assert_exact(ours, hessian(native)(x.detach()) @ tangent)


# ---------------------------------------------------------------- training


def torch_loss(params, x, y):
    hidden = torch.tanh(x @ params["0.weight"].T + params["0.bias"])
    return ((hidden @ params["2.weight"].T + params["2.bias"] - y) ** 2).mean()


def jax_loss(params, x, y):
    hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
    return jnp.mean((hidden @ params["2.weight"].T + params["2.bias"] - y) ** 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_optimizer_trains_a_module(dtype):
    def train(loss):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ).to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        x, y = normal(16, 3).to(dtype), normal(16, 1).to(dtype)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            value = loss(dict(model.named_parameters()), x, y)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(value.item())
        return losses, model.state_dict()

    (ours, our_state), (theirs, their_state) = train(to_torch(jax_loss)), train(torch_loss)
    assert ours[-1] < ours[0]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    assert ours == pytest.approx(theirs, rel=tolerance)
    assert_close(our_state, their_state, rtol=tolerance, atol=tolerance)
    assert all(value.dtype == dtype for value in our_state.values())


def test_a_training_loop_as_a_torch_function():
    """The gradient through an unrolled training loop, for a torch optimizer outside it."""
    x, y = normal(4, 6, 3), normal(4, 6)

    def after_training(w, rate, x, y):
        def loss(params, batch, hyperparams):
            return jnp.mean((batch[0] @ params - batch[1]) ** 2) + 0 * hyperparams["rate"]

        out = jaxmeta.meta_unroll(
            loss, lambda h: optax.sgd(h["rate"]), w, (x[:-1], y[:-1]), hyperparams={"rate": rate}
        )
        return jnp.mean((x[-1] @ out.params - y[-1]) ** 2)

    def by_hand(w, rate, x, y):
        for inputs, targets in zip(x[:-1], y[:-1], strict=True):
            residual = inputs @ w - targets
            w = w - rate * 2 / len(targets) * inputs.T @ residual
        return ((x[-1] @ w - y[-1]) ** 2).mean()

    function = to_torch(after_training)
    arguments = normal(3).requires_grad_(), torch.tensor(0.1, dtype=torch.float64).requires_grad_()
    ours, theirs = function(*arguments, x, y), by_hand(*arguments, x, y)
    assert_exact(ours, theirs)
    firsts = [torch.autograd.grad(v, arguments, create_graph=True) for v in (ours, theirs)]
    assert_exact(*firsts)
    seconds = [torch.autograd.grad(f[0].sum() + f[1], arguments) for f in firsts]
    assert_exact(*seconds)


def test_there_and_back_again():
    """A torch module taken to JAX, and the JAX function of it back to torch."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
    module.double()
    with jax.enable_x64(True):
        lowered = from_torch(module)
    buffers = lowered.buffers
    function = to_torch(lambda params, x: lowered(params, buffers, x)[0])
    params: dict[str, torch.Tensor] = dict(module.named_parameters())
    x = normal(5, 3).requires_grad_()
    ours = function(params, x)
    theirs = functional_call(module, params, (x,))
    assert_exact(ours, theirs)
    wanted = [*params.values(), x]
    assert_exact(
        *[torch.autograd.grad((v**2).sum(), wanted, create_graph=True) for v in (ours, theirs)]
    )

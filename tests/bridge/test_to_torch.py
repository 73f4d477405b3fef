"""Calls of to_torch: what goes in, what comes out, what is compiled, what is refused."""

import collections
import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmeta_bridge.dtypes import TO_JAX, x64_enabled
from jaxmeta_bridge.errors import ConversionError
from jaxmeta_bridge.to_torch import to_torch
from tests.bridge.tensors import example, strided_views

Pair = collections.namedtuple("Pair", "left right")


class Counted:
    """A function that counts how often Python runs it, which is how often it is traced."""

    def __init__(self, function):
        self.function = function
        self.traces = 0

    def __call__(self, *args, **kwargs):
        self.traces += 1
        return self.function(*args, **kwargs)


# ---------------------------------------------------------------- values and dtypes


@pytest.mark.parametrize("dtype", TO_JAX, ids=str)
def test_every_dtype_is_kept_without_any_setting(dtype):
    assert not x64_enabled()
    tensor = example(dtype)
    result = to_torch(lambda x: (x, jnp.flip(x)))(tensor)
    assert result[0].dtype == result[1].dtype == dtype
    bits = [t.contiguous().view(torch.uint8) for t in (tensor, *result)]
    assert torch.equal(bits[0], bits[1])
    itemwise = (*tensor.shape, dtype.itemsize)
    assert torch.equal(bits[0].reshape(itemwise).flip(0, 1), bits[2].reshape(itemwise))


def test_64_bit_values_are_exact():
    double = to_torch(lambda x: x * 2)
    assert double(torch.tensor(1 + 2**-50, dtype=torch.float64)).item() == 2 + 2**-49
    assert double(torch.tensor(2**40 + 1)).item() == 2**41 + 2
    assert not x64_enabled()


def test_float32_stays_float32():
    layer = to_torch(lambda x, w: jnp.tanh(x @ w) * 0.5 + jnp.mean(x))
    assert layer(torch.ones(2, 3), torch.ones(3, 4)).dtype == torch.float32


@pytest.mark.parametrize("name", strided_views())
def test_views(name):
    view = strided_views()[name]
    result = to_torch(lambda x: x * 1)(view)
    assert result.dtype == view.dtype
    assert torch.equal(result, view.clone())


def test_0d_and_empty():
    double = to_torch(lambda x: x * 2)
    assert torch.equal(double(torch.tensor(3.0)), torch.tensor(6.0))
    assert torch.equal(double(torch.zeros(0, 3)), torch.zeros(0, 3))


def test_autocast_has_no_effect():
    product = to_torch(jnp.matmul)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


# ---------------------------------------------------------------- trees


def test_trees_in_and_out():
    def function(params, *rest, scale, shift=None):
        first, second = rest
        return {
            "w": params["layer"]["w"] * scale,
            "pair": Pair([first.left, None], (second[0], shift)),
        }

    result = to_torch(function)(
        {"layer": {"w": torch.ones(2)}},
        Pair(torch.zeros(1), None),
        [torch.arange(3)],
        scale=torch.tensor(4.0),
    )
    assert set(result) == {"w", "pair"}
    assert torch.equal(result["w"], torch.full((2,), 4.0))
    assert isinstance(result["pair"], Pair)
    assert torch.equal(result["pair"].left[0], torch.zeros(1))
    assert result["pair"].left[1] is None
    assert torch.equal(result["pair"].right[0], torch.arange(3))
    assert result["pair"].right[1] is None


def test_results_that_are_no_arrays():
    def function(x):
        return {"none": None, "float": 2.5, "int": 3, "bool": True, "numpy": np.ones(2, np.int8)}

    for x in (torch.ones(2), torch.ones(2, requires_grad=True)):
        result = to_torch(function)(x)
        assert result["none"] is None
        assert result["float"].dtype == torch.float64
        assert result["float"].item() == 2.5
        assert result["int"].dtype == torch.int64
        assert result["bool"].dtype == torch.bool
        assert result["numpy"].dtype == torch.int8
        assert to_torch(lambda x: None)(x) is None


def test_numbers_are_weakly_typed_and_bools_are_fixed():
    def power(x, scale, exponent, flip=False):
        return -scale * x**exponent if flip else scale * x**exponent

    function = to_torch(power)
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(function(x, 2.0, 3), torch.tensor([2.0, 16.0]))
    assert torch.equal(function(x, 2, 3, flip=True), torch.tensor([-2.0, -16.0]))
    assert function(x.to(torch.bfloat16), 0.5, 2).dtype == torch.bfloat16
    assert torch.equal(function(torch.arange(3), 2, 2), torch.tensor([0, 2, 8]))
    assert to_torch(lambda x, z: x * z)(x, 1j).dtype == torch.complex64


def test_jax_and_numpy_arrays_are_inputs():
    dropout = to_torch(lambda x, key, scale: x * jax.random.bernoulli(key, 0.5, x.shape) * scale)
    x, scale = torch.ones(100, requires_grad=True), np.full(100, 2.0, np.float32)
    result = dropout(x, jax.random.key(0), scale)
    assert 0 < result.count_nonzero() < 100
    assert not torch.equal(result, dropout(x, jax.random.key(1), scale))
    scale[:] = 9  # the backward pass is of the call as it was
    result.sum().backward()
    torch.testing.assert_close(x.grad, result.detach(), rtol=0, atol=0)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("size", [64, 100_000])
def test_results_share_nothing(size):
    constant = jnp.zeros(size)
    function = to_torch(lambda x: (x, x, x + 0, constant, jnp.zeros(size)))
    for x in (torch.zeros(size), torch.zeros(size, requires_grad=True)):
        results = function(x)
        with torch.no_grad():
            for value, result in enumerate(results, start=1):
                result += value
        for value, result in enumerate(results, start=1):
            assert torch.equal(result, torch.full((size,), float(value)))
        assert x.count_nonzero() == 0
        assert float(jnp.max(constant)) == 0
        assert all(result.count_nonzero() == 0 for result in function(x))


def test_results_share_nothing_while_jit_is_disabled():
    constant = jnp.zeros(100_000)
    with jax.disable_jit():
        x = torch.zeros(100_000)
        for result in to_torch(lambda x: (x, constant))(x):
            result += 1
    assert x.count_nonzero() == 0
    assert float(jnp.max(constant)) == 0


def test_the_inputs_may_be_changed_at_once():
    power = to_torch(lambda x: (x[0, 0], jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y @ x), x)))
    x = torch.full((500, 500), 0.01)
    expected = power(x)[1].clone()
    result = power(x)[1]
    x.zero_()
    assert torch.equal(result, expected)


# ---------------------------------------------------------------- compilation


def train(loss, shape, steps=3):
    weight = torch.ones(shape[1], requires_grad=True)
    for step in range(steps):
        x = torch.full(shape, float(step))
        loss(x, weight, 0.1 * step).backward()


def test_one_trace_for_each_shape_forward_and_backward():
    counted = Counted(lambda x, w, s: jnp.sum((x @ w) ** 2) * s)
    loss = to_torch(counted)
    train(loss, (4, 3))
    assert counted.traces == 1
    train(loss, (5, 3))
    assert counted.traces == 2
    train(loss, (4, 3))
    assert counted.traces == 2
    with torch.no_grad():
        for _ in range(3):
            loss(torch.ones(4, 3), torch.ones(3), 0.5)
    assert counted.traces == 3  # without residuals it is another program


def test_second_derivatives_stop_tracing_too():
    counted = Counted(lambda x: jnp.sum(jnp.sin(x)))
    function = to_torch(counted)

    def second(value):
        x = torch.full((3,), value, requires_grad=True)
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        first.sum().backward()
        return x.grad

    second(0.1)
    traces = counted.traces
    assert traces <= 3
    for value in (0.2, 0.3):
        torch.testing.assert_close(second(value), -torch.sin(torch.full((3,), value)))
    assert counted.traces == traces


def test_what_is_compiled_anew():
    counted = Counted(lambda x, flag=False, scale=1.0: x * scale if flag else x)
    function = to_torch(counted)
    x = torch.ones(3)
    for arguments, traces in [
        ({}, 1),
        ({"scale": 2.0}, 2),
        ({"scale": 3.0}, 2),
        ({"scale": 3.0, "flag": True}, 3),
        ({"scale": 4.0, "flag": True}, 3),
        ({"scale": 4.0, "flag": False}, 4),
    ]:
        function(x, **arguments)
        assert counted.traces == traces
    function(x.double())
    assert counted.traces == 5
    function(x.double())
    assert counted.traces == 5


def test_threads():
    counted = Counted(lambda x, w: jnp.sum(jnp.sin(x * w)))
    function = to_torch(counted)

    def gradient(seed):
        x = torch.full((50,), float(seed), dtype=torch.float64)
        w = torch.full((50,), 0.5, dtype=torch.float64, requires_grad=True)
        function(x, w).backward()
        torch.testing.assert_close(w.grad, x * torch.cos(x * 0.5))
        return True

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(gradient, range(40)))
    assert counted.traces <= 4


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's compiler looks
def test_inside_torch_compile():
    function = to_torch(lambda x: jnp.sum(x**2))
    compiled = torch.compile(lambda x: function(x * 2) + 1, backend="eager")
    x = torch.ones(3, requires_grad=True)
    result = compiled(x)
    result.backward()
    assert result.item() == 13
    torch.testing.assert_close(x.grad, torch.full((3,), 8.0))


# ---------------------------------------------------------------- refusals


def test_arguments_that_are_refused():
    def loss(params, mode=None):
        return params

    function = to_torch(loss)
    with pytest.raises(ConversionError, match=r"^kwargs\['mode'\] of loss is a str.*partial"):
        function(torch.ones(2), mode="mean")
    with pytest.raises(ConversionError, match=r"^args\[0\]\['a'\]\[1\] of loss has layout torch"):
        function({"a": [torch.ones(2), torch.eye(2).to_sparse()]})
    with pytest.raises(ConversionError, match=r"^args\[0\] of loss is on the meta device"):
        function(torch.ones(2, device="meta"))
    with pytest.raises(ConversionError, match=r"^args\[0\] of loss is a tracer"):
        jax.jit(function)(jnp.ones(2))
    # What is bound beforehand is the function's own business.
    assert to_torch(functools.partial(loss, mode="mean"))(torch.ones(2)).tolist() == [1, 1]


def test_results_that_are_refused():
    def loss(x, kind):
        result = {0: "text", 1: x.astype(jnp.int4), 2: jax.random.key(0), 3: object()}[len(kind)]
        return {"out": [x, result]}

    for count, message in enumerate(["is a str", "dtype int4", "key_data", "is a object"]):
        with pytest.raises(ConversionError, match=rf"^result\['out'\]\[1\] of loss.*{message}"):
            to_torch(loss)(torch.ones(2), [1.0] * count)


def test_errors_of_the_function_arrive():
    class OwnError(Exception):
        pass

    def fail(x):
        raise OwnError("mine")

    @jax.custom_vjp
    def fail_later(x):
        return x * 2

    def backward(_, cotangent):
        raise OwnError("later")

    fail_later.defvjp(lambda x: (x * 2, None), backward)
    x = torch.ones(2, requires_grad=True)
    for tensor in (x, x.detach()):
        with pytest.raises(OwnError, match="mine"):
            to_torch(fail)(tensor)
    result = to_torch(fail_later)(x)
    with pytest.raises(OwnError, match="later"):
        result.sum().backward()
    with pytest.raises(jax.errors.TracerBoolConversionError):
        to_torch(lambda x: x if x.sum() > 0 else -x)(x)


def test_the_old_vmap_of_autograd_is_refused():
    square = to_torch(lambda x: x**2)
    x = torch.ones(3, requires_grad=True)
    message = "is_grads_batched=True or vectorize=True.*use torch.func.vmap"
    with pytest.raises(ConversionError, match=message):
        torch.autograd.grad(square(x), x, torch.eye(3), is_grads_batched=True)
    with pytest.raises(ConversionError, match=message):
        torch.autograd.functional.jacobian(square, x, vectorize=True)

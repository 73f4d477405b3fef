"""`from_torch`: purity, names, caching, state, and every way of calling it wrongly."""

import copy
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import jaxmeta
from jaxmeta import ArgumentKeyError, ArgumentTypeError, ArgumentValueError
from jaxmeta_bridge import (
    ControlFlowError,
    ConversionError,
    UnsupportedOpError,
    from_torch,
    to_torch,
)
from jaxmeta_bridge.from_torch import ModuleFunction

KEY = jax.random.key(0)


RUNS: list[int] = []


class Counted(nn.Module):
    """Counts in RUNS how often its forward is run: what it writes on itself is undone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RUNS.append(1)
        return self.linear(x)


def test_module_matches_torch_and_leaves_it_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    f = from_torch(module)
    assert list(f.params) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    outputs, new_buffers = f(f.params, f.buffers, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(outputs, module(x).detach(), rtol=1e-4, atol=1e-6)
    assert new_buffers == {}
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())


def test_params_follow_the_module_and_are_copies() -> None:
    module = nn.Linear(2, 2)
    f = from_torch(module)
    old = f.params["weight"]
    value = np.array(old)
    with torch.no_grad():
        module.weight.add_(1.0)
    np.testing.assert_array_equal(old, value)
    np.testing.assert_allclose(f.params["weight"], value + 1.0, rtol=1e-6)


def test_traced_once_per_signature_and_again_when_the_module_changes() -> None:
    RUNS.clear()
    module = Counted()
    f = from_torch(module)
    params, buffers = f.params, f.buffers
    for _ in range(3):
        f(params, buffers, jnp.ones((4, 3)))
        jax.jit(f)(params, buffers, jnp.zeros((4, 3)))
        jax.grad(lambda p: f(p, buffers, jnp.ones((4, 3)))[0].sum())(params)
    assert len(RUNS) == 1
    f(params, buffers, jnp.ones((5, 3)))
    assert len(RUNS) == 2
    module.eval()
    f(params, buffers, jnp.ones((5, 3)))
    assert len(RUNS) == 3


def test_a_plain_attribute_that_changes_is_not_stale() -> None:
    activation = nn.LeakyReLU(0.1)
    f = from_torch(nn.Sequential(activation))
    x = jnp.array([-1.0])
    assert f({}, {}, x)[0][0] == pytest.approx(-0.1)
    activation.negative_slope = 0.5
    assert f({}, {}, x)[0][0] == pytest.approx(-0.5)


def test_forward_leaves_nothing_behind() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0
            self.last: torch.Tensor | None = None
            self.log: list[torch.Tensor] = []
            self.stored: dict[str, list[torch.Tensor]] = {"x": []}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            self.last = x * 2
            self.log.append(x)
            self.stored["x"].append(x)
            self.register_buffer("cache", x + 1)
            return self.last

    module = Stateful()
    f = from_torch(module)
    np.testing.assert_array_equal(f({}, {}, jnp.ones(2))[0], [2.0, 2.0])
    assert module.count == 0 and module.last is None and dict(module.named_buffers()) == {}
    assert module.log == [] and module.stored == {"x": []}


def test_batch_statistics_come_back_as_new_buffers() -> None:
    module = nn.BatchNorm1d(3)
    reference = copy.deepcopy(module)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    f = from_torch(module)
    buffers = f.buffers
    assert buffers["num_batches_tracked"].dtype == jnp.int32
    outputs, new_buffers = f(f.params, buffers, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(outputs, reference(x).detach(), rtol=1e-5, atol=1e-6)
    for name, expected in reference.named_buffers():
        np.testing.assert_allclose(new_buffers[name], expected, rtol=1e-6)
    np.testing.assert_array_equal(buffers["running_mean"], np.zeros(3))
    assert module.state_dict()["num_batches_tracked"] == 0
    module.eval()
    outputs, unchanged = f(f.params, new_buffers, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(outputs, reference.eval()(x).detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(unchanged["running_var"], new_buffers["running_var"])


def test_buffers_assigned_or_changed_in_place() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total = nn.Buffer(torch.zeros(2))
            self.seen = nn.Buffer(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total = self.total + x
            self.seen[0] += 1.0
            return self.total * self.seen[0]

    f = from_torch(Running())
    outputs, new = f({}, f.buffers, jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(outputs, [1.0, 2.0])
    outputs, new = f({}, new, jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(outputs, [4.0, 8.0])
    np.testing.assert_array_equal(new["seen"], [2.0, 0.0])


def test_tied_parameters_stand_once_and_share_their_gradient() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    module = nn.Sequential(first, second)
    f = from_torch(module)
    assert list(f.params) == ["0.weight"]
    gradient = jax.grad(lambda p: f(p, {}, jnp.ones((2, 3)))[0].sum())(f.params)
    module(torch.ones(2, 3)).sum().backward()
    assert first.weight.grad is not None
    np.testing.assert_allclose(gradient["0.weight"], first.weight.grad, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_are_known() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    f = from_torch(module)
    assert f.frozen == {"0.weight", "0.bias"}
    trainable, frozen = f.partition(f.params)
    assert list(trainable) == ["1.weight", "1.bias"] and set(frozen) == f.frozen

    def loss(trainable: dict[str, jax.Array]) -> jax.Array:
        return f(trainable | frozen, {}, jnp.ones((4, 2)))[0].sum()

    assert set(jax.grad(loss)(trainable)) == set(trainable)


def test_no_grad_around_the_first_call_does_not_cut_the_gradient() -> None:
    f = from_torch(nn.Linear(3, 1))
    with torch.no_grad():
        f(f.params, {}, jnp.ones(3))
    with torch.inference_mode():
        f(f.params, {}, jnp.ones((2, 3)))
    for x in (jnp.ones(3), jnp.ones((2, 3))):
        gradient = jax.grad(lambda p, x=x: f(p, {}, x)[0].sum())(f.params)
        assert float(jnp.abs(gradient["weight"]).sum()) > 0


def test_detach_data_and_no_grad_cut_the_gradient() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            held = x * 5
        return x.detach() * x + x.data * x + held * x

    gradient = jax.grad(from_torch(function))(jnp.float32(2.0))
    assert float(gradient) == 2.0 + 2.0 + 10.0


def test_function_of_trees_with_keywords_and_plain_values() -> None:
    def function(
        batch: dict[str, torch.Tensor], scale: float, *, shift: torch.Tensor, mode: str = "sum"
    ) -> dict[str, object]:
        total = getattr(batch["x"] * scale + shift, mode)()
        return {"total": total, "n": len(batch), "pair": (batch["x"], None)}

    g = from_torch(function)
    outputs = g({"x": jnp.arange(3.0)}, 2.0, shift=jnp.ones(3), mode="mean")
    assert float(outputs["total"]) == 3.0 and outputs["n"] == 1 and outputs["pair"][1] is None
    assert float(g({"x": jnp.arange(3.0)}, 3.0, shift=jnp.ones(3))["total"]) == 12.0


def test_numbers_that_compare_equal_are_told_apart() -> None:
    g = from_torch(lambda x, p: x * p)
    assert g(jnp.arange(2), 1).dtype == jnp.int32
    assert g(jnp.arange(2), 1.0).dtype == jnp.float32


def test_in_place_operations_on_inputs_stay_inside() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x[0] = 7.0
        return x.mul_(2)

    x = jnp.ones(2)
    np.testing.assert_array_equal(from_torch(function)(x), [14.0, 2.0])
    np.testing.assert_array_equal(x, [1.0, 1.0])


def test_captured_tensors_are_read_anew() -> None:
    weight = torch.tensor([1.0, 2.0])
    g = from_torch(lambda x: (x * weight).sum())
    assert float(g(jnp.ones(2))) == 3.0
    weight.add_(1.0)
    assert float(g(jnp.ones(2))) == 5.0
    assert float(jax.jit(g)(jnp.ones(2))) == 5.0
    assert float(g(jnp.ones(2))) == 5.0  # the jitted call left no tracer behind


def test_captured_tensor_that_requires_grad_is_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(
        ConversionError, match=r"shape \(1, 2\) that requires grad.*test_from_torch"
    ):
        from_torch(lambda x: model(x))(jnp.ones(2))


def test_random_modules_need_a_key_and_repeat_with_it() -> None:
    module = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5))
    f = from_torch(module)
    x = jnp.ones((1, 8))
    with pytest.raises(ArgumentValueError, match=r"rng is None.*'1'.*jax.random.key"):
        f(f.params, {}, x)
    one, two = (f(f.params, {}, x, rng=KEY)[0] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, f(f.params, {}, x, rng=jax.random.key(1))[0])
    module.eval()
    f(f.params, {}, x)


def test_two_draws_differ() -> None:
    g = from_torch(lambda x: (torch.rand_like(x), torch.rand_like(x)))
    one, two = g(jnp.zeros(8), rng=KEY)
    assert not np.array_equal(one, two)


def test_vmap_over_parameters_equals_a_loop() -> None:
    f = from_torch(nn.Linear(3, 2))
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p, 3 * p]), f.params)
    batched = jax.vmap(lambda p: f(p, {}, jnp.ones((4, 3)))[0])(params)
    for i in range(3):
        single = f(jax.tree.map(lambda p, i=i: p[i], params), {}, jnp.ones((4, 3)))[0]
        np.testing.assert_allclose(batched[i], single, rtol=1e-6)


def test_float64_module_needs_x64_only_when_used() -> None:
    f = from_torch(nn.Linear(2, 1).double())
    with pytest.raises(ConversionError, match=r"float64.*enable_x64"):
        _ = f.params
    with jax.enable_x64(True):
        outputs, _ = f(f.params, {}, jnp.ones(2))
        assert outputs.dtype == jnp.float64


def test_float64_inside_a_float32_module_is_refused_without_x64() -> None:
    g = from_torch(lambda x: x.double().sum())
    with pytest.raises(ConversionError, match=r"float64.*test_from_torch.py.*x64"):
        g(jnp.ones(2))
    with jax.enable_x64(True):
        assert g(jnp.ones(2, jnp.float32)).dtype == jnp.float64


def test_bfloat16_parameters() -> None:
    f = from_torch(nn.Linear(3, 2))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), f.params)
    assert f(params, {}, jnp.ones(3, jnp.bfloat16))[0].dtype == jnp.bfloat16


# Bad input


def test_every_unsupported_operation_is_reported_at_once() -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.linalg.eigvals(x)
            return torch.special.airy_ai(x) + y.real

    module = nn.Sequential(nn.Identity(), Block())
    with pytest.raises(UnsupportedOpError) as caught:
        from_torch(module)({}, {}, jnp.eye(2))
    message = str(caught.value)
    assert "special_airy_ai" in message and "linalg_eig" in message
    assert message.count("module '1'") == 2
    assert "y = torch.linalg.eigvals(x)" in message and "test_from_torch.py" in message


@pytest.mark.parametrize(
    "branch",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * x.sum().item(),
        lambda x: x[: int(x.sum())],
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.from_numpy(x.numpy()),
    ],
)
def test_python_control_flow_names_the_line(branch: object) -> None:
    with pytest.raises(ControlFlowError, match=r"(?s)test_from_torch.py:\d+"):
        from_torch(branch)(jnp.ones(3))  # type: ignore[call-overload]


@pytest.mark.parametrize("select", [lambda x: x[x > 0], torch.nonzero, torch.unique])
def test_shapes_that_depend_on_values_are_refused(select: object) -> None:
    with pytest.raises((ControlFlowError, UnsupportedOpError), match="test_from_torch.py|values"):
        from_torch(select)(jnp.ones(3))  # type: ignore[call-overload]


def test_custom_autograd_function_is_refused() -> None:
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grad_outputs: torch.Tensor) -> torch.Tensor:
            return -grad_outputs[0]

    with pytest.raises(UnsupportedOpError, match="Reverse.*custom_vjp"):
        from_torch(lambda x: Reverse.apply(x).sum())(jnp.ones(2))


def test_module_that_changes_its_parameter_is_refused() -> None:
    class Clipped(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.clamp_(-1, 1)
            return super().forward(input)

    f = from_torch(Clipped(2, 2))
    with pytest.raises(ArgumentValueError, match="changes its parameter 'weight'"):
        f(f.params, {}, jnp.ones(2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2, device="meta"), r"'weight' is on the meta device.*to_empty"),
        (lambda: nn.LazyLinear(2), r"'weight' has no shape yet"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), "TorchScript"),
        (lambda: torch.compile(nn.Linear(2, 2)), "torch.compile"),
    ],
)
def test_modules_without_traceable_tensors(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        from_torch(make())


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation.*:UserWarning")
def test_sparse_and_quantised_buffers_are_refused() -> None:
    module = nn.Module()
    module.register_buffer("b", torch.eye(2).to_sparse())
    with pytest.raises(ConversionError, match=r"'b'.*sparse.*to_dense"):
        from_torch(module)
    module.register_buffer("b", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    with pytest.raises(ConversionError, match=r"'b'.*quanti.*dequantize"):
        from_torch(module)


@pytest.mark.parametrize("target", [3, nn.Linear, "relu"])
def test_target_that_is_neither_module_nor_function(target: object) -> None:
    with pytest.raises(ArgumentTypeError, match="target.*expects an nn.Module instance"):
        from_torch(target)  # type: ignore[call-overload]


@pytest.fixture
def linear() -> ModuleFunction:
    return from_torch(nn.Linear(3, 2))


def test_wrong_keys(linear: ModuleFunction) -> None:
    params = linear.params
    params["wieght"] = params.pop("weight")
    with pytest.raises(ArgumentKeyError, match=r"params.*missing \['weight'\].*\['wieght'\]"):
        linear(params, {}, jnp.ones(3))
    with pytest.raises(ArgumentKeyError, match=r"buffers.*unknown \['mean'\]"):
        linear(linear.params, {"mean": jnp.ones(2)}, jnp.ones(3))


def test_wrong_shape(linear: ModuleFunction) -> None:
    params = linear.params | {"bias": jnp.ones(3)}
    with pytest.raises(ArgumentValueError, match=r"params\['bias'\] has shape \(3,\).*\(2,\)"):
        linear(params, {}, jnp.ones(3))


def test_params_of_the_wrong_type(linear: ModuleFunction) -> None:
    with pytest.raises(ArgumentTypeError, match="params is a list"):
        linear([1], {}, jnp.ones(3))  # type: ignore[arg-type]
    torch_params = dict(nn.Linear(3, 2).named_parameters())
    with pytest.raises(ArgumentTypeError, match=r"params\['bias'\] is a torch tensor.*to_torch"):
        linear(torch_params, {}, jnp.ones(3))  # type: ignore[arg-type]


def test_inputs_of_the_wrong_type(linear: ModuleFunction) -> None:
    with pytest.raises(ArgumentTypeError, match=r"args\[0\] is a torch tensor"):
        linear(linear.params, {}, torch.ones(3))
    with pytest.raises(ArgumentTypeError, match=r"args\[0\] is a random key.*rng="):
        linear(linear.params, {}, KEY)
    with pytest.raises(ArgumentTypeError, match=r"args\[0\] is a set"):
        linear(linear.params, {}, {1, 2})


def test_errors_of_torch_itself_come_through(linear: ModuleFunction) -> None:
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        linear(linear.params, {}, jnp.ones(5))


def test_in_place_change_of_a_captured_tensor_is_refused_and_undone() -> None:
    count = torch.zeros(2)

    def function(x: torch.Tensor) -> torch.Tensor:
        count.add_(1)
        return x * count

    with pytest.raises(UnsupportedOpError, match=r"count.add_\(1\).*register_buffer"):
        from_torch(function)(jnp.ones(2))
    assert torch.equal(count, torch.zeros(2))


def test_module_made_inside_the_callable_draws_its_weights_from_the_key() -> None:
    g = from_torch(lambda x: nn.Linear(2, 2)(x))
    with pytest.raises(ArgumentValueError, match="rng is None"):
        g(jnp.ones(2))
    np.testing.assert_array_equal(g(jnp.ones(2), rng=KEY), g(jnp.ones(2), rng=KEY))


def test_named_results_of_torch_are_named_tuples_under_jit() -> None:
    out = jax.jit(from_torch(lambda x: x.max(0)))(jnp.array([1.0, 3.0, 2.0]))
    assert float(out.values) == 3.0 and int(out.indices) == 1


def test_indexing_by_an_integer_tensor() -> None:
    def function(x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.clone()
        y[i] = 0.0
        return x[i], x[:, i], x[i, i], y

    x, i = np.arange(9.0, dtype=np.float32).reshape(3, 3), 2
    row, column, entry, zeroed = jax.jit(from_torch(function))(jnp.asarray(x), jnp.int32(i))
    np.testing.assert_array_equal(row, x[i])
    np.testing.assert_array_equal(column, x[:, i])
    np.testing.assert_array_equal(entry, x[i, i])
    np.testing.assert_array_equal(zeroed, [*x[:2], np.zeros(3)])


@pytest.mark.parametrize("pad", [(1, 2), (2, 1, 0, 3), (-1, 2)])
def test_circular_padding(pad: tuple[int, ...]) -> None:
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    expected = nn.functional.pad(x, pad if len(pad) == 4 else (*pad, 0, 0), mode="circular")
    g = from_torch(
        lambda x: nn.functional.pad(x, pad if len(pad) == 4 else (*pad, 0, 0), mode="circular")
    )
    np.testing.assert_array_equal(g(jnp.asarray(x.numpy())), expected)


def test_in_place_changes_under_no_grad_keep_the_gradient() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 3
        with torch.no_grad():
            y.mul_(2)
            y[0] = 0.0
            y.clamp_(max=7.0)
        return (y * torch.tensor([1.0, 2.0, 3.0])).sum()

    x = torch.tensor([1.0, 1.0, 2.0], requires_grad=True)
    expected = function(x)
    expected.backward()
    value, gradient = jax.value_and_grad(from_torch(function))(jnp.array([1.0, 1.0, 2.0]))
    assert float(value) == expected.item()
    np.testing.assert_array_equal(gradient, x.grad)


def test_in_place_change_of_a_detached_tensor_is_refused() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 3
        y.detach().mul_(2)
        return y

    with pytest.raises(UnsupportedOpError, match="detached tensor in place"):
        from_torch(function)(jnp.ones(2))


@pytest.mark.parametrize(
    ("attribute", "change", "expected"),
    [
        ([2.0], lambda m: m.a.__setitem__(0, 5.0), 5.0),
        ({"k": 2.0}, lambda m: m.a.__setitem__(0, 5.0), 5.0),
        (torch.tensor(2.0), lambda m: setattr(m, "a", torch.tensor(5.0)), 5.0),
        (lambda: 2.0, lambda m: setattr(m, "a", lambda: 5.0), 5.0),
        (0.0, lambda m: setattr(m, "a", -0.0), -1.0),
    ],
)
def test_no_kind_of_attribute_is_stale(attribute: Any, change: Any, expected: float) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = attribute

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = cast(Any, self.a)
            if isinstance(a, float):
                return torch.copysign(x, torch.tensor(a))
            if isinstance(a, list):
                a = a[0]
            if isinstance(a, dict):
                a = a.get(0, a["k"])
            return x * cast(float, a() if callable(a) else a)

    module = Scaled()
    f = from_torch(module)
    f({}, {}, jnp.float32(1.0))
    change(module)
    assert float(f({}, {}, jnp.float32(1.0))[0]) == expected


def test_children_that_are_replaced_or_tied_anew_are_not_stale() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Tanh())
    f = from_torch(module)
    params = {"0.weight": jnp.eye(2), "1.weight": 2 * jnp.eye(2)}
    f(params, {}, jnp.ones(2))
    for activation in (nn.LogSigmoid, nn.Sigmoid, nn.ReLU):
        module[2] = activation()
        expected = module[2](torch.full((2,), 2.0))
        np.testing.assert_allclose(f(params, {}, jnp.ones(2))[0], expected, rtol=1e-6)
    module[1].weight = module[0].weight
    assert float(f({"0.weight": 3 * jnp.eye(2)}, {}, jnp.ones(2))[0][0]) == 9.0


def test_modules_in_a_closure_are_followed() -> None:
    dropout = nn.Dropout(0.5).eval()
    g = from_torch(lambda x: dropout(x))
    np.testing.assert_array_equal(g(jnp.ones(64)), np.ones(64))
    dropout.train()
    assert float(jnp.min(g(jnp.ones(64), rng=KEY))) == 0.0


@pytest.mark.parametrize(
    "function",
    [lambda x: x.clamp(max=2**40), lambda x: x < 2**40, lambda x: x * 3_000_000_000 % 7],
)
def test_integers_that_need_64_bits_are_refused_without_x64(function: Any) -> None:
    x = torch.tensor([-1, 0, 5])
    with pytest.raises(ConversionError, match="x64 mode is off"):
        from_torch(function)(jnp.asarray(x.numpy(), jnp.int32))
    with jax.enable_x64(True):
        result = from_torch(function)(jnp.asarray(x.numpy()))
    np.testing.assert_array_equal(result, function(x))


def test_hooks_on_gradients_are_refused() -> None:
    module = nn.Linear(2, 1)
    module.weight.register_hook(lambda g: 10 * g)
    f = from_torch(module)
    with pytest.raises(UnsupportedOpError, match=r"\['weight'\] have hooks"):
        f(f.params, {}, jnp.ones(2))


def test_python_numbers_do_not_widen_results_inside_to_torch() -> None:
    g = from_torch(lambda x, s: x.sum() * s)
    double = to_torch(lambda x, s: g(x, s))
    assert double(torch.ones(2), 0.5).dtype == torch.float32
    assert double(torch.ones(2, dtype=torch.float64), 0.1).item() == 0.2


def test_masked_transformer_encoder_in_eval_mode() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module = nn.TransformerEncoder(layer, 1).eval()
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    f = from_torch(module)
    outputs, _ = f(f.params, {}, jnp.asarray(x), src_key_padding_mask=jnp.asarray(mask))
    keep = ~mask.numpy()
    expected = module(x, src_key_padding_mask=mask).detach().numpy()
    np.testing.assert_allclose(np.asarray(outputs)[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_wrong_kind_of_dtype(linear: ModuleFunction) -> None:
    with pytest.raises(ArgumentTypeError, match=r"params\['bias'\] is int32; the module's"):
        linear(linear.params | {"bias": jnp.ones(2, jnp.int32)}, {}, jnp.ones(3))


def test_eval_is_followed_by_to_torch_and_meta_unroll() -> None:
    norm = nn.BatchNorm1d(2, affine=False)
    f = from_torch(norm)
    buffers = f.buffers
    through_torch = to_torch(lambda x: f({}, buffers, x)[0])

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return (f({}, buffers, x)[0] * w).sum()

    def after_a_step() -> float:
        x = jnp.array([[1.0, 2.0], [5.0, 8.0]])
        out = jaxmeta.meta_unroll(loss, optimizer, jnp.ones(()), batch=x, num_steps=1)
        return float(out.params)

    optimizer = optax.sgd(1.0)
    x = torch.tensor([[1.0, 2.0], [5.0, 8.0]])
    in_training = through_torch(x), after_a_step()
    norm.eval()
    torch.testing.assert_close(through_torch(x), norm(x))
    assert not torch.equal(through_torch(x), in_training[0])
    np.testing.assert_allclose(after_a_step(), 1.0 - norm(x).sum().item(), rtol=1e-5)
    assert in_training[1] == pytest.approx(1.0, abs=1e-4)


def test_a_generator_of_its_own_is_refused() -> None:
    generator = torch.Generator()
    with pytest.raises(UnsupportedOpError, match="torch.Generator"):
        from_torch(lambda x: x.clone().normal_(generator=generator))(jnp.ones(3), rng=KEY)


def test_batch_norm_that_averages_over_all_batches() -> None:
    module = nn.BatchNorm1d(2, momentum=None)
    reference = copy.deepcopy(module)
    f = from_torch(module)
    buffers = f.buffers
    for seed in range(3):
        x = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed))
        outputs, buffers = f(f.params, buffers, jnp.asarray(x.numpy()))
        np.testing.assert_allclose(outputs, reference(x).detach(), rtol=1e-4, atol=1e-5)
    for name, expected in reference.named_buffers():
        np.testing.assert_allclose(buffers[name], expected, rtol=1e-5)
    assert "forward" not in vars(module)

"""Each rule steps as torch.optim does."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from optim_cases import CASES, FULLEST, Case, gradients, unrolled

from jaxmeta import ArgumentKeyError, ArgumentTypeError, ArgumentValueError
from jaxmeta_bridge import tensor_to_jax
from jaxmeta_bridge.optim import rule_for

STEPS = 20


@pytest.fixture
def float64_default() -> Iterator[None]:
    """torch keeps some scalars of its state in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def shapes(case: Case) -> list[tuple[int, ...]]:
    if case.optimizer is torch.optim.Muon:
        return [(4, 2)]
    return [(2, 2, 3), (3,), ()]


def torch_steps(optimizer: Any, param: torch.Tensor, grads: Any) -> None:
    for grad in grads:
        param.grad = torch.tensor(grad, dtype=param.dtype)
        optimizer.step()


def start(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = np.random.default_rng(1).standard_normal(shape)
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def assert_close(actual: Any, expected: torch.Tensor, rtol: float) -> None:
    values = expected.detach().double().numpy()
    scale = np.abs(values).max()
    np.testing.assert_allclose(np.asarray(actual, "f8"), values, rtol=rtol, atol=rtol * scale)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps(name: str):
    check_steps(CASES[name])


@pytest.mark.usefixtures("x64", "float64_default")
@pytest.mark.parametrize("name", ["asgd", "nadam", "nadam-decoupled"])
def test_twenty_steps_with_scalars_in_float64(name: str):
    check_steps(CASES[name])


def check_steps(case: Case) -> None:
    numeric, _ = case.split()
    params = [start(shape) for shape in shapes(case)]
    grads = [gradients(STEPS, tuple(param.shape)) for param in params]
    ours = [tensor_to_jax(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        torch_steps(case.make([param]), param, grad)
    for param, last in zip(params, run(case, ours, grads, numeric), strict=True):
        assert_close(last, param, 1e-10)


def run(case: Case, params: list[Any], grads: list[Any], numeric: Any) -> list[jax.Array]:
    """The last parameters, as one compiled program."""

    @jax.jit
    def all_of_them(params: list[Any], grads: list[Any], numeric: Any) -> list[jax.Array]:
        pairs = zip(params, grads, strict=True)
        return [unrolled(case, param, grad, numeric)[0] for param, grad in pairs]

    return all_of_them(params, grads, numeric)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", FULLEST)
def test_resumes_and_keeps_what_torch_keeps(name: str):
    case = CASES[name]
    numeric, static = case.split()
    param, grads = start((2, 3)), gradients(STEPS, (2, 3))
    optimizer = case.make([param])
    torch_steps(optimizer, param, grads[:7])
    ours = tensor_to_jax(param)
    loaded = case.rule.load(optimizer.state[param], jax.typeof(ours), static)
    state = {key: tensor_to_jax(value) for key, value in loaded.items()}
    fresh = case.rule.init(jax.typeof(ours), numeric, static)
    assert state.keys() == fresh.keys()
    state = {key: value.astype(fresh[key].dtype) for key, value in state.items()}
    torch_steps(optimizer, param, grads[7:])
    ours, state = unrolled(case, ours, grads[7:], numeric, state)
    assert_close(ours, param, 1e-10)
    for key in state.keys() - {"started"}:
        assert_close(state[key], optimizer.state[param][key], 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", FULLEST)
def test_lower_precision_keeps_its_dtype(name: str):
    case = CASES[name]
    numeric, _ = case.split()
    params = [start((2, 3), dtype) for dtype in (torch.float32, torch.bfloat16)]
    grads = gradients(3, (2, 3))
    ours = [tensor_to_jax(param) for param in params]
    for param in params:
        torch_steps(case.make([param]), param, grads)
    # A scan refuses a state whose dtypes change.
    last = run(case, ours, [grads, grads], jax.tree.map(jnp.float64, numeric))
    assert [param.dtype for param in last] == [param.dtype for param in ours]
    # In Muon, other last bits round to another bfloat16.
    exact = case.optimizer is not torch.optim.Muon
    assert_close(last[0], params[0], 2e-6 if exact else 0.03)
    assert_close(last[1], params[1], 0.03)


def test_adafactors_default_epsilon_is_that_of_the_parameters_dtype():
    case = CASES["adafactor"]
    numeric, _ = case.split()
    param, grads = start((3,), torch.bfloat16), gradients(2, (3,)) * 1e-3
    ours = tensor_to_jax(param)
    torch_steps(case.make([param]), param, grads)
    assert_close(unrolled(case, ours, jnp.asarray(grads, ours.dtype), numeric)[0], param, 0.01)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "asgd", "nadam"])
def test_float32_options_beside_float64_parameters(name: str):
    case = CASES[name]
    numeric, _ = case.split()
    narrow = jax.tree.map(jnp.float32, numeric)
    param, grads = tensor_to_jax(start((2, 3))), gradients(5, (2, 3))
    ours, _ = unrolled(case, param, grads, narrow)
    # Exactly the numbers that float32 holds, with nothing else in float32.
    expected, _ = unrolled(
        case, param, grads, jax.tree.map(lambda x: float(np.float32(x)), numeric)
    )
    assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, expected, rtol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n for n in FULLEST if n not in ("adafactor", "muon")])
def test_elementwise_options(name: str):
    case = CASES[name]
    numeric, _ = case.split()
    param, grads = tensor_to_jax(start((3,))), gradients(9, (3,))
    scales = jnp.array([1.0, 0.9, 0.8])
    numeric = jax.tree.map(lambda x: x * scales, numeric)
    (ours,) = run(case, [param], [grads], numeric)
    alone = jax.vmap(lambda *of_one: run(case, *of_one)[0], in_axes=([0], [1], 0))
    np.testing.assert_allclose(ours, alone([param], [grads], numeric), rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_elementwise_learning_rate_of_a_factored_optimizer():
    for name in ("adafactor", "muon"):
        case = CASES[name]
        numeric, _ = case.split()
        param, grads = tensor_to_jax(start((2, 3))), gradients(1, (2, 3))
        rates = jnp.arange(6.0).reshape(2, 3) / 100
        ours, _ = unrolled(case, param, grads, numeric | {"lr": rates})
        for rate in (0.0, 0.03):
            expected, _ = unrolled(case, param, grads, numeric | {"lr": rate})
            where = rates == rate
            np.testing.assert_allclose(ours[where], expected[where], rtol=1e-13)


def test_number_zero_switches_off_and_tensor_zero_does_not():
    group = torch.optim.SGD([torch.zeros(1)], lr=0.1).param_groups[0]
    numeric, static = rule_for(torch.optim.SGD).split(group)
    assert set(numeric) == {"lr", "dampening"}
    assert not dict(static)["momentum"]
    for zero in (torch.tensor(0.0), jnp.zeros(()), np.zeros(1)):
        numeric, static = rule_for(torch.optim.SGD).split({**group, "momentum": zero})
        assert numeric["momentum"] is zero
        assert dict(static)["momentum"]
    hash(static)


def test_flags_may_be_tensors():
    group = torch.optim.Adam([torch.zeros(1)]).param_groups[0]
    _, static = rule_for(torch.optim.Adam).split({**group, "amsgrad": torch.tensor(True)})
    assert dict(static)["amsgrad"] is True


def test_state_of_an_unstepped_optimizer_is_left_to_init():
    for name in ("adam", "adagrad"):
        case = CASES[name]
        param = torch.zeros(2)
        state = case.make([param]).state.get(param, {})
        assert case.rule.load(state, jax.ShapeDtypeStruct((2,), "float32"), case.split()[1]) == {}


def test_option_switched_on_later_starts_then():
    case = CASES["adam"]
    rule, (numeric, _) = case.rule, case.split()
    group = case.make([torch.zeros(2)]).param_groups[0]
    plain, amsgrad = (rule.split({**group, "amsgrad": on})[1] for on in (False, True))
    param = jnp.ones(2)
    param, state = rule.update(param, param, rule.init(param, numeric, plain), numeric, plain)
    _, state = rule.update(param, param, state, numeric, amsgrad)
    np.testing.assert_allclose(state["max_exp_avg_sq"], state["exp_avg_sq"])


class Inheriting(torch.optim.Adam):
    """Changes nothing about the step."""


class Overriding(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return None


class Unknown(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> Any:
        return None


def test_subclass_that_inherits_step_has_its_parents_rule():
    for made in (False, True):
        if made:
            Inheriting([torch.zeros(1)])  # torch now wraps the step of the class
        assert rule_for(Inheriting) is rule_for(torch.optim.Adam)
    assert rule_for(torch.optim.AdamW).name == "AdamW"


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "LBFGS evaluates its closure.*Adadelta, Adafactor, .*SGD"),
        (torch.optim.SparseAdam, "SparseAdam updates only"),
        (Overriding, "Overriding has a step of its own.*use torch.optim.Adam"),
        (Unknown, "Unknown is no optimizer of torch.optim"),
    ],
)
def test_optimizers_without_a_rule(optimizer: Any, message: str):
    with pytest.raises(ArgumentValueError, match=message):
        rule_for(optimizer)


def test_errors_about_arguments():
    rule = rule_for(torch.optim.SGD)
    with pytest.raises(ArgumentTypeError, match="expected a subclass of torch.optim.Optimizer"):
        rule_for(torch.nn.Linear)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentKeyError, match="lack 'dampening'"):
        rule.split({"lr": 0.1})
    numeric, static = CASES["sgd"].split()
    with pytest.raises(ArgumentTypeError, match="complex64.*torch.view_as_real"):
        rule.init(jnp.ones(2, "complex64"), numeric, static)
    with pytest.raises(ArgumentTypeError, match="int32"):
        rule.update(jnp.ones(2, "int32"), jnp.ones(2), {}, numeric, static)
    with pytest.raises(ArgumentValueError, match=r"lr of SGD has shape \(3,\).*shape \(2,\)"):
        rule.update(jnp.ones(2), jnp.ones(2), {}, numeric | {"lr": jnp.ones(3)}, static)
    numeric, static = CASES["adafactor"].split()
    with pytest.raises(ArgumentValueError, match="d of Adafactor.*expected one number"):
        rule_for(torch.optim.Adafactor).init(jnp.ones(2), numeric | {"d": jnp.ones(2)}, static)
    numeric, static = CASES["muon"].split()
    with pytest.raises(ArgumentValueError, match="expected a matrix"):
        rule_for(torch.optim.Muon).init(jnp.ones(2), numeric, static)

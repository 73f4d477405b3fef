"""Differentiate through a training loop."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp

from jaxmeta import checks, nonfinite, optimizers
from jaxmeta.adjoint import Adjoint, Explanation, collect_notes, resolve_adjoint
from jaxmeta.manual_axes import vary, varying
from jaxmeta.objective import Objective
from jaxmeta.optimizers import Transformation
from jaxmeta.signature import Passing, hyperparams_passing
from jaxmeta.static import Static, closes_over_tracer
from jaxmeta.trees import PyTree, hide, reveal, strong


class Unrolled(NamedTuple):
    """What :func:`meta_unroll` returns. What was not asked for is None.

    Attributes:
        params: the parameters after the last step.
        opt_state: the optimizer's state after the last step.
        losses: float[step], ``losses[t]`` at the parameters before update ``t``.
        aux: what ``loss_fn`` returned beside its loss, with a leading step axis.
        state: the model state after the last step.
        key: the random key to go on with.
        trajectory: the parameters with a leading axis of T + 1: ``[0]`` are the initial ones,
            ``[t]`` those after ``t`` updates.
        adjoint: how the loop is differentiated, and why, in one line.
    """

    params: PyTree
    opt_state: PyTree
    losses: jax.Array
    aux: PyTree
    state: PyTree
    key: jax.Array | None
    trajectory: PyTree
    adjoint: str


def meta_unroll(
    loss_fn: Callable[..., Any],
    optimizer: Transformation | Callable[[PyTree], Transformation],
    params: PyTree,
    batches: PyTree = None,
    *,
    batch: PyTree = None,
    num_steps: SupportsIndex | None = None,
    hyperparams: PyTree = None,
    opt_state: PyTree = None,
    state: PyTree = None,
    key: jax.Array | None = None,
    has_aux: bool = False,
    trajectory: bool = False,
    adjoint: Adjoint | Literal["auto"] = "auto",
    debug: bool = False,
) -> Unrolled:
    r"""Train ``params`` for T steps; the result is differentiable in everything given.

    With the inner loss :math:`\ell` and the optimizer's update :math:`u` and state :math:`s`,

    .. math:: g_t = \partial_w \ell(w_t, b_t, h), \quad (u_t, s_{t+1}) = u(g_t, s_t, w_t, h),
        \quad w_{t+1} = w_t + u_t, \quad t = 0, \dots, T - 1.

    :math:`w_T`, the losses and all else that is returned can be differentiated to any order in
    ``params``, ``hyperparams``, the batches, ``opt_state``, ``state``, and in whatever ``loss_fn``
    and ``optimizer`` close over, by ``jax.grad``, ``jax.jvp`` and what is built on them.
    ``jax.vmap`` and ``jax.jit`` apply as to any JAX function.

    The loop is compiled once for each ``loss_fn``, ``optimizer``, ``adjoint`` and shape of the
    arrays. As for ``jax.jit``, ``loss_fn`` is known by its identity: globals and attributes that it
    reads are those of the time it was first traced, and a function that is defined anew for each
    call, or a variable of an enclosing function bound anew, is compiled anew, unless the whole is
    inside an outer ``jax.jit``, which is also faster.

    Args:
        loss_fn: ``loss_fn(params, batch)`` or, where it has a third argument,
            ``loss_fn(params, batch, hyperparams)``; with ``state=`` and ``key=`` as keywords where
            these are given. Returns the loss, a float scalar; ``(loss, aux)`` with ``has_aux``;
            ``(loss, new_state)`` with ``state``; ``(loss, (new_state, aux))`` with both.
        optimizer: an optax transformation, or a function ``hyperparams -> transformation``, which
            makes everything that optax computes from the hyperparams differentiable. ``value``,
            ``grad`` and ``value_fn`` are passed to an ``update`` that takes them.
        params: tree of float arrays. They keep their dtypes, and so does the optimizer's state,
            whatever the dtypes of hyperparams and batches.
        batches: tree of arrays ``[step, ...]``; step ``t`` is given ``leaf[t]``. A data set that
            every step should see whole is ``batch``, not this.
        batch: instead of ``batches``, a tree that every step is given. With neither, ``loss_fn``
            is given None.
        num_steps: T; needed where ``batches`` does not tell it.
        hyperparams: tree of arrays, the meta-parameters of ``loss_fn``, ``optimizer`` or both.
        opt_state: the optimizer's state to continue from; by default ``optimizer.init(params)``.
        state: tree of arrays, the model's state, such as batch statistics; keeps its dtypes.
        key: a random key. Each step does ``key, subkey = jax.random.split(key)`` and gives the
            subkey to ``loss_fn``.
        has_aux: whether ``loss_fn`` returns more than its loss.
        trajectory: whether to return the parameters of every step.
        adjoint: how the loop is differentiated; :class:`Auto`, the default, chooses among the
            exact ways.
        debug: find the first inner step with a loss, gradient or update that is NaN or infinite.

    Returns:
        An :class:`Unrolled`. Unrolling 3 steps and then 4 from its ``params``, ``opt_state``,
        ``state`` and ``key`` is unrolling 7.

    Raises:
        ArgumentTypeError, ArgumentValueError, ArgumentKeyError: an argument is wrong; the message
            names it.
        NonFiniteError: with ``debug``. Inside ``jax.jit`` JAX raises it as
            ``jax.errors.JaxRuntimeError``, with this error in its text, when the result is used.

    Note:
        Meta-gradients are NaN where a derivative that they need is infinite. Adam and other
        optimizers that divide by the square root of an average of squares do this to a
        parameter whose gradient is exactly zero: there the derivative of the square root is
        infinite. Give ``eps_root`` a small value, ``optax.adam(lr, eps_root=1e-8)``; this
        changes the updates slightly. The line search of ``optax.lbfgs`` is a ``while_loop``, which
        JAX differentiates in forward mode only.

    Example:
        How learning rate and momentum change the distance to a target after three steps:

        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> def loss_fn(w, x):
        ...     return jnp.mean((x * w - 2.0 * x) ** 2)
        >>> def meta_loss(h, xs):
        ...     out = jaxmeta.meta_unroll(
        ...         loss_fn, lambda h: optax.sgd(h["lr"], h["momentum"]), jnp.float32(0.0), xs,
        ...         hyperparams=h)
        ...     return (out.params - 2.0) ** 2
        >>> xs = jnp.array([[1.0, 2.0], [0.5, 1.0], [1.0, 1.5]])
        >>> gradient = jax.grad(meta_loss)({"lr": 0.1, "momentum": 0.5}, xs)
        >>> print(f"{gradient['lr']:.4f} {gradient['momentum']:.4f}")
        1.6439 0.2138

    References:
        Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through
        reversible learning", ICML 2015, https://arxiv.org/abs/1502.03492. Finn, Abbeel and
        Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017,
        https://arxiv.org/abs/1703.03400.
    """
    checks.check_params(params)
    arrays = {"batches": batches, "batch": batch, "hyperparams": hyperparams, "state": state}
    for name, tree in arrays.items():
        checks.check_arrays(name, tree)
    checks.check_key(key)
    adjoint = resolve_adjoint(adjoint)
    length = checks.count_steps(batches, batch, num_steps)
    passing = hyperparams_passing(
        loss_fn,
        hyperparams=hyperparams is not None,
        state=state is not None,
        key=key is not None,
    )
    optimizers.check_optimizer(
        optimizer, hyperparams=hyperparams, loss_takes_hyperparams=passing is not None
    )
    program = _Program(
        Static(loss_fn), passing, Static(optimizer), adjoint, length, has_aux, trajectory, debug
    )
    carry = _Carry(strong(params), strong(hide(opt_state)), strong(state), key)
    unrolled, flags = _compiled(program)(carry, batches, batch, hyperparams)
    if debug:
        nonfinite.raise_first(flags, nonfinite.labels(params))
    return unrolled._replace(opt_state=reveal(unrolled.opt_state))


@dataclass(frozen=True)
class _Program:
    """All that decides what is compiled, beside shapes and dtypes."""

    loss_fn: Static
    passing: Passing
    optimizer: Static
    adjoint: Adjoint
    length: int
    has_aux: bool
    trajectory: bool
    debug: bool


class _Carry(NamedTuple):
    """What one step hands to the next."""

    params: PyTree
    opt_state: PyTree
    state: PyTree
    key: jax.Array | None


class _Record(NamedTuple):
    """What a step leaves behind."""

    loss: jax.Array
    aux: PyTree
    params: PyTree
    flags: jax.Array | None


def _compiled(program: _Program) -> Callable[..., tuple[Unrolled, Any]]:
    if any(closes_over_tracer(item.value) for item in (program.loss_fn, program.optimizer)):
        return _jit(program)
    return _kept(program)


@functools.lru_cache(maxsize=64)
def _kept(program: _Program) -> Callable[..., tuple[Unrolled, Any]]:
    return _jit(program)


def _jit(program: _Program) -> Callable[..., tuple[Unrolled, Any]]:
    def meta_unroll(
        carry: _Carry, batches: PyTree, batch: PyTree, hyperparams: PyTree
    ) -> tuple[Unrolled, jax.Array | None]:
        return _run(program, carry, batches, batch, hyperparams)

    return jax.jit(meta_unroll)


def _run(
    program: _Program, carry: _Carry, batches: PyTree, batch: PyTree, hyperparams: PyTree
) -> tuple[Unrolled, jax.Array | None]:
    optimizer = optimizers.build(program.optimizer.value, hyperparams)
    carry = carry._replace(opt_state=optimizer.start(carry.params, carry.opt_state))
    carry = vary(carry, varying(carry.params))

    def step(carry: _Carry, own_batch: PyTree) -> tuple[_Carry, _Record]:
        key, subkey = (None, None) if carry.key is None else jax.random.split(carry.key)
        objective = Objective(
            loss_fn=program.loss_fn.value,
            passing=program.passing,
            has_aux=program.has_aux,
            batch=own_batch if batch is None else batch,
            hyperparams=hyperparams,
            state=carry.state,
            key=subkey,
        )
        value_and_grad = program.adjoint.value_and_grad(objective)
        (loss, (state, aux)), gradient = value_and_grad(carry.params)
        params, opt_state = optimizer.step(gradient, carry.opt_state, carry.params, loss, objective)
        record = _Record(
            loss=loss,
            aux=aux,
            params=carry.params if program.trajectory else None,
            flags=nonfinite.flag_step(loss, gradient, params) if program.debug else None,
        )
        return _Carry(params, opt_state, state, key), record

    with collect_notes() as notes:
        last, records = program.adjoint.loop(step, carry, batches, program.length)
    trajectory = None
    if program.trajectory:
        trajectory = jax.tree.map(
            lambda before, after: jnp.concatenate([before, after[None]]),
            records.params,
            last.params,
        )
    unrolled = Unrolled(
        params=last.params,
        opt_state=last.opt_state,
        losses=records.loss,
        aux=records.aux,
        state=last.state,
        key=last.key,
        trajectory=trajectory,
        adjoint=Explanation("; ".join(notes) or repr(program.adjoint)),
    )
    return unrolled, records.flags

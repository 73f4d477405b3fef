"""Scripts and the process around them: threads, copies, files, memory, raw access, length."""

# Every loop of these scripts runs at least once.
# pyright: reportPossiblyUnboundVariable=false

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from scripts import EAGER, assert_same, batch, check, gradients, network, normal, run, script, sgd
from torch import nn
from torch.utils.data import default_collate

from jaxmeta import JaxmetaError
from jaxmeta_bridge import higher as drop_in


def maml(higher, model, **options):
    return higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **options)


def adapted(higher, seed=0, steps=2, peek=lambda *values: None):
    model = network()
    x, y = batch(seed=seed)
    with maml(higher, model) as (fmodel, diffopt):
        for _ in range(steps):
            loss = F.mse_loss(fmodel(x), y)
            peek(loss)
            diffopt.step(loss)
        meta = F.mse_loss(fmodel(x), y)
    return model, fmodel, meta


@script
def test_saved_pickled_and_copied_results(higher, peek):
    model, fmodel, meta = adapted(higher, peek=peek)
    weights = [p.detach() for p in fmodel.parameters()]
    meta.backward()
    file = io.BytesIO()
    torch.save({"weights": weights, "meta": meta.detach(), "grads": gradients(model)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["meta"]) is torch.Tensor
    pickled = pickle.loads(pickle.dumps(weights))
    copied = copy.deepcopy(weights)
    copied[0].add_(1)
    weights[0].clone().add_(1)
    again = copy.deepcopy(model)
    return loaded, pickled, copied, weights, gradients(again), gradients(model)


@script
def test_results_in_new_modules_and_collections(higher, peek):
    _, fmodel, meta = adapted(higher, peek=peek)
    fresh = nn.Linear(3, 4).double()
    first, bias, *_ = fmodel.parameters()
    fresh.weight = nn.Parameter(first.detach())
    fresh.bias = nn.Parameter(bias.detach().clone())
    fresh.register_buffer("kept", first.detach())
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    fresh(normal(2, 3)).sum().backward()
    optimizer.step()
    collated = default_collate([meta.detach(), meta.detach() + 1])
    listed = nn.ParameterList([nn.Parameter(p.detach()) for p in fmodel.parameters()])
    vector = nn.utils.parameters_to_vector(listed)
    return list(fresh.parameters()), fresh.state_dict(), collated, vector, fmodel(normal(2, 3))


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, unpickled])
def test_a_copied_model_is_right_or_refused(make):
    """A copy of the patched model computes the same, and a step leaves it as it is."""
    model = network()
    x, y = batch()
    with maml(drop_in, model) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        try:
            twin = make(fmodel)
        except (JaxmetaError, RuntimeError, AttributeError, TypeError, pickle.PicklingError):
            return
        expected = fmodel(x).tolist()
        assert twin(x).tolist() == expected
        if make is not copy.copy:
            diffopt.step(F.mse_loss(fmodel(x), y))
            assert twin(x).tolist() == expected != fmodel(x).tolist()


def test_threads_that_run_loops_at_once():
    results = {}

    def work(i):
        try:
            model, _, meta = adapted(drop_in, seed=i, steps=2 + i % 2)
            meta.backward()
            results[i] = [meta.item(), *[g.tolist() for g in gradients(model)]]
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        model, _, meta = adapted(EAGER, seed=i, steps=2 + i % 2)
        meta.backward()
        assert isinstance(results[i], list), results[i]
        for got, g in zip(results[i], [meta, *gradients(model)], strict=True):
            torch.testing.assert_close(
                torch.tensor(got, dtype=torch.float64), g.detach(), rtol=1e-9, atol=1e-9
            )


def test_recorded_in_one_thread_and_read_in_another():
    model, fmodel, meta = adapted(drop_in)
    results = []

    def work():
        meta.backward()
        results.append([meta.item(), [p.tolist() for p in fmodel.parameters()]])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    expected_model, _, expected = adapted(EAGER)
    expected.backward()
    assert results and results[0][0] == pytest.approx(expected.item(), rel=1e-9)
    (got, _), (want, _) = (
        run(lambda *_: gradients(model), None),
        run(lambda *_: gradients(expected_model), None),
    )
    assert_same(got, want)


RAW_ACCESS = """
import ctypes, warnings
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from jaxmeta_bridge import higher

warnings.simplefilter("ignore")
model = nn.Linear(2, 1).double()
x = torch.ones(3, 2, dtype=torch.float64)
opt = torch.optim.SGD(model.parameters(), lr=0.1)


def pointer(t):
    t = t.contiguous()
    address = t.data_ptr()
    if not address:
        raise RuntimeError("no storage")
    return (ctypes.c_double * t.numel()).from_address(address)[:]


WAYS = {
    "numpy": lambda t: t.numpy().reshape(-1).tolist(),
    "numpy, forced": lambda t: t.numpy(force=True).reshape(-1).tolist(),
    "asarray": lambda t: np.asarray(t).reshape(-1).tolist(),
    "np.from_dlpack": lambda t: np.from_dlpack(t).reshape(-1).tolist(),
    "torch.from_dlpack": lambda t: torch.from_dlpack(t).reshape(-1).tolist(),
    "to_dlpack": lambda t: torch.from_dlpack(torch.utils.dlpack.to_dlpack(t)).view(-1).tolist(),
    "data_ptr": pointer,
    "storage": lambda t: np.frombuffer(bytes(t.clone().untyped_storage().tolist())).tolist(),
    "memoryview": lambda t: np.array(memoryview(t.numpy())).reshape(-1).tolist(),
    "as_strided": lambda t: t.clone().as_strided((t.numel(),), (1,)).tolist(),
    "view dtype": lambda t: t.view(torch.int64).view(torch.float64).reshape(-1).tolist(),
    "share_memory_": lambda t: t.clone().share_memory_().view(-1).tolist(),
    "deepcopy": lambda t: __import__("copy").deepcopy(t).view(-1).tolist(),
    "as_subclass": lambda t: t.as_subclass(torch.Tensor).reshape(-1).tolist(),
    "Tensor()": lambda t: torch.Tensor(t.float()).reshape(-1).tolist(),
    "torch.tensor": lambda t: torch.tensor(t).reshape(-1).tolist(),
    "as_tensor": lambda t: torch.as_tensor(t).reshape(-1).tolist(),
    "stacked by C": lambda t: torch.stack([torch.zeros_like(t), t])[1].reshape(-1).tolist(),
    "jit": lambda t: torch.jit.trace(lambda a: a * 1, torch.ones_like(t))(t).view(-1).tolist(),
    "dispatch off": lambda t: no_dispatch(t),
}


def no_dispatch(t):
    with torch._C.DisableTorchFunctionSubclass():
        return (t * 1).reshape(-1).tolist()


for name, way in WAYS.items():
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(fmodel(x).pow(2).mean())
        results = [next(fmodel.parameters()).detach()]
        model.zero_grad()
        fmodel(x).pow(2).mean().backward()
        results.append(model.weight.grad)
        for kind, t in zip(("recorded", "gradient"), results):
            try:
                got = way(t)
            except Exception as error:
                print(f"{kind} {name}: refused {type(error).__name__}: {str(error)[:60]}")
                continue
            np.testing.assert_allclose(got, np.reshape(t.tolist(), -1), rtol=1e-6, err_msg=name)
print("alive")
"""


def test_raw_access_is_right_or_refused_and_never_ends_the_process():
    """In a process of its own, because what goes wrong here is a crash."""
    done = subprocess.run(
        [sys.executable, "-c", RAW_ACCESS],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0 and "alive" in done.stdout, (done.returncode, done.stderr[-2000:])
    for way in ("numpy", "asarray", "torch.from_dlpack", "deepcopy", "as_tensor", "stacked by C"):
        assert f" {way}: refused" not in done.stdout, done.stdout


def test_nothing_is_kept_alive():
    """Inputs, models and recordings go when the script lets them go, read or not."""

    def once(read):
        model, x = network(), normal(4, 3)
        with maml(drop_in, model) as (fmodel, diffopt):
            for _ in range(2):
                loss = fmodel(x).pow(2).mean()
                if read:
                    loss.item()
                diffopt.step(loss)
            meta = fmodel(x).pow(2).mean()
            meta.backward()
        return [weakref.ref(o) for o in (model, x, fmodel, diffopt, meta, loss)]

    for read in (False, True):
        references = once(read)
        gc.collect()
        alive = [type(r()) for r in references if r() is not None]
        assert not alive, f"still alive (read={read}): {alive}"


def test_objects_do_not_pile_up():
    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(4):
        for i in range(3):
            model, _, meta = adapted(drop_in, seed=i)
            meta.backward()
            model.zero_grad()
        del model, meta
        counts.append(tensors())
    assert counts[-1] <= counts[1] + 2, counts


def test_the_graph_in_test_mode_is_let_go():
    """track_higher_grads=False: the weights and losses of earlier steps are not held."""
    model, x = network(), normal(4, 3)
    references = []
    with drop_in.innerloop_ctx(model, sgd(model), track_higher_grads=False) as (fmodel, diffopt):
        for _ in range(6):
            loss = fmodel(x).pow(2).mean()
            references.append(weakref.ref(loss))
            diffopt.step(loss)
            loss.item()
        del loss
        gc.collect()
        assert sum(r() is not None for r in references) <= 1


@script
def test_long_loops(higher, peek):
    """Many steps and sums over them: no limit of Python's recursion is in the way."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(0.5)
    x, y = normal(4, 1), normal(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    total = torch.zeros((), dtype=torch.float64)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (f, diffopt):
        for i in range(600):
            loss = F.mse_loss(f(x), y)
            if i % 300 == 0:
                peek(loss)
            diffopt.step(loss)
            total = total + loss
        (total / 600).backward()
    return total, f.fast_params, gradients(model)


def test_a_long_chain_without_steps():
    def function(higher, peek):
        model = nn.Linear(1, 1, bias=False).double()
        with torch.no_grad():
            model.weight.fill_(0.5)
        with maml(higher, model) as (fmodel, diffopt):
            h = fmodel(torch.ones(1, 1, dtype=torch.float64))
            for _ in range(1200):
                h = h + 0.001
            diffopt.step(h.pow(2).sum())
            meta = fmodel(torch.ones(1, 1, dtype=torch.float64)).sum()
        meta.backward()
        return meta, gradients(model)

    check(function)


def test_an_exception_in_the_block_leaves_everything_usable():
    model = network()
    x, y = batch()
    kept = []

    def interrupted():
        with maml(drop_in, model) as (fmodel, diffopt):
            kept.extend([fmodel, diffopt])
            diffopt.step(F.mse_loss(fmodel(x), y))
            raise KeyError("stop")

    with pytest.raises(KeyError):
        interrupted()
    fmodel, diffopt = kept
    diffopt.step(F.mse_loss(fmodel(x), y))
    F.mse_loss(fmodel(x), y).backward()
    expected, _, value = adapted(EAGER)
    value.backward()
    assert_same([g.tolist() for g in gradients(model)], [g.tolist() for g in gradients(expected)])

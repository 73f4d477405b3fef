"""Gradients by weights that depend on each other, changed modules, threads: what a review found."""

import threading

import pytest
import torch
import torch.nn.functional as F
from eager_higher import innerloop_ctx as eager_innerloop_ctx
from scripts import batch, gradients, network, script, sgd
from torch import autograd, nn

from jaxmeta_bridge import higher as drop_in


def mse(call, seed=0):
    x, y = batch(seed=seed)
    return F.mse_loss(call(x), y)


def maml(higher, model, opt=None, **options):
    return higher.innerloop_ctx(model, opt or sgd(model), copy_initial_weights=False, **options)


@script
def test_two_optimizers_of_one_model_step_in_turns(higher, peek):
    """The body's weights depend on the head's: the head's gradient leads through them, too."""
    model = network()
    params = list(model.parameters())
    fmodel = higher.monkeypatch(model, copy_initial_weights=False)
    body = higher.get_diff_optim(torch.optim.SGD(params[:2], lr=0.1), params, fmodel)
    head = higher.get_diff_optim(torch.optim.SGD(params[2:], lr=0.1), params, fmodel)
    for i in range(2):
        body.step(mse(fmodel, i))
        head.step(mse(fmodel, i + 3))
        peek(*fmodel.parameters())
    meta = mse(fmodel, 5)
    meta.backward()
    return meta, list(fmodel.parameters()), gradients(model)


@script
def test_clipping_by_the_norm_of_all_gradients_where_only_the_head_learns(higher, peek):
    def clip(found):
        norm = torch.stack([gradient.pow(2).sum() for gradient in found]).sum().sqrt()
        return [gradient / norm for gradient in found]

    model = network()
    head = torch.optim.SGD(list(model.parameters())[2:], lr=0.1)
    with maml(higher, model, head) as (fmodel, diffopt):
        for i in range(3):
            diffopt.step(mse(fmodel, i), grad_callback=clip)
        meta = mse(fmodel, 5)
        meta.backward()
    return meta, list(fmodel.parameters()), gradients(model)


@script
def test_gradients_by_weights_of_several_times(higher, peek):
    model = network()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        diffopt.step(mse(fmodel, 1))
        first, last = list(fmodel.parameters(time=0)), list(fmodel.parameters())
        peek(*last)
        meta = mse(fmodel, 2) + sum(p.pow(2).sum() for p in first)
        return list(autograd.grad(meta, [*first, *last]))


@script
def test_gradients_by_the_model_and_its_fast_weights(higher, peek):
    model = network()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        fast = list(fmodel.parameters())
        meta = mse(fmodel, 1)
        found = autograd.grad(meta, [*model.parameters(), *fast], create_graph=True)
        return [gradient.detach() for gradient in found]


@script
def test_gradients_by_an_activation_and_weights(higher, peek):
    model = network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        weights = list(fmodel.parameters())
        hidden = torch.tanh(F.linear(x, weights[0], weights[1]))
        peek(hidden)
        loss = F.mse_loss(F.linear(hidden, weights[2], weights[3]), y)
        return list(autograd.grad(loss, [hidden, *weights]))


@script
def test_updates_by_hand_of_every_other_weight(higher, peek):
    model = network()
    with maml(higher, model) as (fmodel, _):
        for i in range(3):
            weights = list(fmodel.parameters())
            found = autograd.grad(mse(fmodel, i), weights, create_graph=True)
            fmodel.update_params(
                [
                    w - 0.1 * g if k % 2 == i % 2 else w
                    for k, (w, g) in enumerate(zip(weights, found, strict=True))
                ]
            )
        meta = mse(fmodel, 4)
        meta.backward()
    return meta, gradients(model)


@script
def test_second_derivatives_of_a_loop_with_changes_under_no_grad(higher, peek):
    """Autograd does not notice the change: no factor 1.1 in any derivative."""
    model = network()
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(4):
            diffopt.step(mse(fmodel, i))
            weights = [weight.clone() for weight in fmodel.parameters()]
            with torch.no_grad():
                weights[0].mul_(1.1)
            fmodel.update_params(weights)
        meta = mse(fmodel, 50)
        found = autograd.grad(meta, list(model.parameters()), create_graph=True)
        torch.stack([gradient.pow(2).sum() for gradient in found]).sum().backward()
    return meta, gradients(model)


@script
def test_data_of_an_owed_gradient(higher, peek):
    model = network()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        mse(fmodel, 3).backward()
    for parameter in model.parameters():
        parameter.grad.data.clamp_(-0.1, 0.1)
    return gradients(model)


@script
def test_backward_in_threads_that_have_ended(higher, peek):
    models = [network(), network()]

    def work(i):
        with maml(higher, models[i]) as (fmodel, diffopt):
            diffopt.step(mse(fmodel, i))
            mse(fmodel, i + 1).backward()

    for i in range(2):
        thread = threading.Thread(target=work, args=(i,))
        thread.start()
        thread.join()
    return [gradients(model) for model in models]


@script
def test_a_layer_is_appended_in_the_loop(higher, peek):
    model = network()
    with maml(higher, model) as (fmodel, diffopt):
        before = mse(fmodel)
        diffopt.step(before)
        fmodel.append(nn.Tanh())
        after = mse(fmodel)
        diffopt.step(after)
        meta = mse(fmodel)
        meta.backward()
    return before, after, meta, gradients(model)


@pytest.mark.parametrize("way", ["setitem", "add_module", "insert"])
def test_a_layer_is_replaced_in_the_loop(way):
    def losses(context):
        model = network()
        with context(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
            diffopt.step(mse(fmodel))
            modules = getattr(fmodel, "_module", fmodel)  # eager: the copy inside
            if way == "setitem":
                modules[1] = nn.ReLU()
            elif way == "add_module":
                modules.add_module("1", nn.ReLU())
            else:
                modules._modules["1"] = nn.ReLU()
            return mse(fmodel).item()

    expected = losses(eager_innerloop_ctx)
    assert losses(drop_in.innerloop_ctx) == pytest.approx(expected, rel=1e-9)


@script
def test_layers_with_attributes_that_cannot_be_hashed(higher, peek):
    model = network()
    model[0].notes = {"a": 1}
    model.log = [[1, 2]]
    model[1].tags = {1, 2}
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        meta = mse(fmodel)
        meta.backward()
    return meta, gradients(model)


@script
def test_a_model_that_changes_its_dtype_after_a_loop(higher, peek):
    model = network(dtype=torch.float32)
    x, y = batch()
    with maml(higher, model) as (kept, diffopt):
        diffopt.step(F.mse_loss(kept(x.float()), y.float()))
    model.double()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        meta = F.mse_loss(fmodel(x), y)
        meta.backward()
    assert kept is not None
    return meta, gradients(model)


@script
def test_a_detached_leaf_whose_original_changes(higher, peek):
    """`detach()` shares memory; what was made a leaf stays one."""
    model = network()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        fast = list(fmodel.parameters())
        own = [weight.detach().requires_grad_() for weight in fast]
        with torch.no_grad():
            fast[0].mul_(2)
        fmodel.update_params(own)
        meta = mse(fmodel, 1)
        return meta, list(autograd.grad(meta, own))


@script
def test_a_gradient_by_what_the_loop_does_not_know(higher, peek):
    model, other = network(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        meta = mse(fmodel, 1)
        (found,) = autograd.grad(meta, [other], allow_unused=True, create_graph=True)
    assert found is None
    return meta


@script
def test_a_leaf_changed_through_what_shares_its_memory(higher, peek):
    """`data`, and a part under no_grad: it stays the leaf on which gradients land."""
    model = network()
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        first = next(fmodel.parameters())
        first.data.mul_(0.5)
        with torch.no_grad():
            first[0].add_(1.0)
        assert first.is_leaf
        peek(first)
        diffopt.step(mse(fmodel))
        meta = mse(fmodel, 1)
        meta.backward()
        return meta, first.detach(), first.grad, list(fmodel.parameters())


@script
def test_a_weight_written_in_part_meets_what_cannot_be_recorded(higher, peek):
    model = network()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        weights = [weight.clone() for weight in fmodel.parameters()]
        with torch.no_grad():
            weights[0][1].mul_(2.0)
        fmodel.update_params(weights)
        found = torch.fft.fft(fmodel(batch()[0])[:, 0]).abs().sum()
        found.backward()
    return found, gradients(model)

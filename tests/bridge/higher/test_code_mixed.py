"""Scripts that mix recorded values with other tensors that carry gradients, and with each other."""

# Every loop of these scripts runs at least once.
# pyright: reportPossiblyUnboundVariable=false

import torch
import torch.nn.functional as F
from scripts import batch, gradients, network, normal, script, sgd
from torch import autograd, nn
from torch.func import functional_call


def maml(higher, model, **options):
    return higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **options)


@script
def test_another_network_before_and_after(higher, peek):
    """An encoder that feeds the inner model and a decoder on top of it, both trained outside."""
    model = network(3)
    encoder, decoder = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
    x, y = batch()
    outer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1)
    for _ in range(2):
        with maml(higher, model) as (fmodel, diffopt):
            for _ in range(2):
                loss = F.mse_loss(decoder(fmodel(torch.relu(encoder(x)))), y)
                peek(loss)
                diffopt.step(loss)
            meta = decoder(fmodel(encoder(x))).pow(2).mean() + encoder(x).mean()
        outer.zero_grad()
        meta.backward()
        outer.step()
    return meta, gradients(model), gradients(encoder), list(decoder.parameters())


@script
def test_a_learned_loss_network(higher, peek):
    model, learned = network(), network()
    with torch.no_grad():
        learned[0].weight.mul_(2)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.01)
    x, y = batch()
    for _ in range(2):
        with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
            for _ in range(2):
                out = fmodel(x)
                loss = learned(torch.cat([out, y, out * y], dim=1)).square().mean()
                peek(loss)
                diffopt.step(loss)
            meta = F.mse_loss(fmodel(x), y)
        optimizer.zero_grad()
        meta.backward()
        optimizer.step()
    return meta, gradients(learned), list(learned.parameters()), gradients(model)


@script
def test_weights_per_example(higher, peek):
    """Learning to reweight: the gradient at zero weights, then the real step with them."""
    model = network()
    optimizer = sgd(model)
    x, y = batch(6)
    x_clean, y_clean = batch(3, seed=5)
    weights = []
    for _ in range(2):
        with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
            eps = torch.zeros(6, dtype=torch.float64, requires_grad=True)
            cost = F.mse_loss(fmodel(x), y, reduction="none").squeeze(1)
            peek(cost)
            diffopt.step((cost * eps).sum())
            grad = autograd.grad(F.mse_loss(fmodel(x_clean), y_clean), eps)[0].detach()
        w = torch.clamp(-grad, min=0)
        if w.sum().item() > 0:
            w = w / w.sum()
        loss = (F.mse_loss(model(x), y, reduction="none").squeeze(1) * w).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weights.append(w)
    return weights, list(model.parameters())


@script
def test_images_and_soft_labels_as_variables(higher, peek):
    """Distillation: inputs, labels and a learned learning rate, all leaves."""
    model = network(3)
    images = normal(3, 3).requires_grad_()
    labels = torch.eye(3, dtype=torch.float64).requires_grad_()
    raw = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([images, labels, raw], lr=0.1, momentum=0.5)
    for _ in range(2):
        override = {"lr": [F.softplus(raw)]}
        with higher.innerloop_ctx(model, sgd(model), override=override) as (fmodel, diffopt):
            for _ in range(2):
                log_p = fmodel(images).log_softmax(1)
                loss = -(labels.softmax(1) * log_p).sum(1).mean()
                peek(loss)
                diffopt.step(loss)
            meta = F.cross_entropy(fmodel(normal(4, 3, seed=2)), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        meta.backward()
        optimizer.step()
    return meta, images, images.grad, labels.grad, raw.grad


@script
def test_generated_initial_weights(higher, peek):
    """The initial weights are another network's output, not leaves."""
    model, generator = network(), nn.Linear(2, 21).double()
    with torch.no_grad():
        generator.weight.copy_(0.3 * normal(21, 2))
        generator.bias.copy_(0.3 * normal(21))
    sizes = [p.numel() for p in model.parameters()]
    x, y = batch()
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        made = generator(normal(2)).split(sizes)
        fmodel.update_params([m.view_as(p) for m, p in zip(made, model.parameters(), strict=True)])
        for _ in range(2):
            loss = F.mse_loss(fmodel(x), y)
            peek(loss)
            diffopt.step(loss)
        meta = F.mse_loss(fmodel(x), y)
    meta.backward()
    return meta, gradients(generator), gradients(model)


@script
def test_a_perturbed_start(higher, peek):
    """update_params with a function of the fast weights and of a learned mask."""
    model = network()
    mask = nn.Parameter(normal(4, 3))
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        first, *rest = fmodel.parameters()
        fmodel.update_params([first * mask.sigmoid(), *rest])
        loss = F.mse_loss(fmodel(x), y)
        diffopt.step(loss)
        first, *rest = fmodel.parameters()
        peek(first)
        fmodel.update_params([first + 0.1 * mask, *[p + 0.1 * torch.randn_like(p) for p in rest]])
        meta = F.mse_loss(fmodel(x), y)
    meta.backward()
    return meta, mask.grad, gradients(model)


@script
def test_the_model_itself_in_the_loss(higher, peek):
    """A proximal term to the model's own parameters and its own predictions as targets."""
    model = network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        for _ in range(2):
            out = fmodel(x)
            loss = F.mse_loss(out, y) + 0.5 * F.mse_loss(out, model(x))
            pairs = zip(fmodel.parameters(), model.parameters(), strict=True)
            loss = loss + 0.1 * sum((p - q).pow(2).sum() for p, q in pairs)
            peek(loss)
            diffopt.step(loss)
        meta = F.mse_loss(fmodel(x), y) + F.mse_loss(model(x), fmodel(x))
    meta.backward()
    return meta, gradients(model)


@script
def test_two_agents_that_learn_from_each_other(higher, peek):
    """Interleaved contexts; each loss uses the other's latest fast weights."""
    one, two = network(), network()
    with torch.no_grad():
        two[0].weight.neg_()
    with maml(higher, one) as (f_one, opt_one), maml(higher, two) as (f_two, opt_two):
        for i in range(2):
            x, y = batch(seed=i)
            a, b = f_one(x), f_two(x)
            loss_one = F.mse_loss(a, y) + (a * b).mean()
            loss_two = F.mse_loss(b, -y) - (a * b).mean()
            peek(loss_one)
            opt_one.step(loss_one)
            opt_two.step(loss_two)
            opt_two.step(F.mse_loss(f_two(x), f_one(x)))
        pairs = zip(f_one.parameters(), f_two.parameters(), strict=True)
        distance = [(p - q).pow(2).sum() for p, q in pairs]
        meta = torch.stack(distance).sum() + f_one(x).mean() * f_two(x).mean()
    meta.backward()
    return meta, gradients(one), gradients(two)


@script
def test_an_inner_loop_in_an_inner_loop(higher, peek):
    """The outer level steps on the result of an inner loop that starts at its fast weights."""
    model, target = network(), network()
    x, y = batch()
    with maml(higher, model) as (outer, outer_opt):
        for i in range(2):
            with higher.innerloop_ctx(target, sgd(target)) as (inner, inner_opt):
                inner.update_params([p * 1.0 for p in outer.parameters()])
                for _ in range(2):
                    inner_opt.step(F.mse_loss(inner(x), y))
                peek(*inner.parameters())
                level = F.mse_loss(inner(batch(seed=i)[0]), y)
            outer_opt.step(level)
        meta = F.mse_loss(outer(x), y)
    meta.backward()
    return meta, gradients(model), gradients(target)


@script
def test_two_optimizers_on_one_loss(higher, peek):
    """The generator and the discriminator of an adversarial pair, and one loss given to both."""
    generator, judge = network(3), network()
    with maml(higher, generator) as (g, g_opt), maml(higher, judge) as (d, d_opt):
        noise, real = normal(4, 3), normal(4, 3, seed=1)
        fake = g(noise)
        d_loss = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
        d_opt.step(d_loss)
        peek(d_loss, fake)
        g_opt.step(F.softplus(-d(fake)).mean())
        both = d(g(noise)).pow(2).mean()
        g_opt.step(both)
        d_opt.step(both)
        meta = d(g(noise)).mean()
    meta.backward()
    return meta, gradients(generator), gradients(judge)


@script
def test_results_of_one_block_used_in_the_next(higher, peek):
    """Adapted weights, a loss and outputs of a finished block enter another one."""
    model = network()
    x, y = batch()
    with maml(higher, model) as (teacher, diffopt):
        diffopt.step(F.mse_loss(teacher(x), y))
        soft = teacher(x)
    peek(soft)
    with maml(higher, model) as (student, diffopt):
        diffopt.step(F.mse_loss(student(x), soft))
        anchor = list(teacher.parameters())
        loss = sum((p - q).abs().sum() for p, q in zip(student.parameters(), anchor, strict=True))
        diffopt.step(loss)
        meta = F.mse_loss(student(x), y)
    meta.backward()
    return meta, gradients(model)


@script
def test_recorded_weights_in_functional_call_and_modules(higher, peek):
    """Fast weights go into torch.func.functional_call, F.linear and another module."""
    model, outside = network(), network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        weights = dict(fmodel.named_parameters())
        out = functional_call(outside, weights, (x,))
        w0, b0, w1, b1 = fmodel.parameters()
        again = F.linear(torch.tanh(F.linear(x, w0, b0)), w1, b1)
        peek(out, again)
        meta = (out * again).mean() + outside(w0.repeat(1, 1)).pow(2).mean()
    meta.backward()
    return meta, out, again, gradients(model), gradients(outside)


@script
def test_labels_as_the_inner_variables(higher, peek):
    """step(loss, params=[labels]): the inner loop is over plain tensors."""
    model = network(3)
    labels = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    inner = torch.optim.SGD([labels], lr=0.5)
    diffopt = higher.get_diff_optim(inner, [labels])
    guess = labels
    for _ in range(2):
        energy = (model(normal(4, 3)) * guess.softmax(1)).sum() + guess.pow(2).sum()
        peek(energy)
        (guess,) = diffopt.step(energy, params=[guess])
    meta = F.mse_loss(guess, torch.eye(4, 3, dtype=torch.float64))
    meta.backward()
    return meta, guess, labels.grad, gradients(model)

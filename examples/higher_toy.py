"""One weight, five inner steps: hypergradients of learning rate and momentum.

A script for the `higher` library, of which one line is changed: `import higher`.
"""

import numpy as np
import torch

from jaxmeta_bridge import higher

x = torch.from_numpy(np.random.RandomState(1).random_sample((100, 1)))
y = 3.5 * x

for copy_initial_weights in (False, True):
    torch.manual_seed(3)
    model = torch.nn.Linear(1, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    lr = torch.tensor([0.3], requires_grad=True)
    momentum = torch.tensor([0.5], requires_grad=True)

    with higher.innerloop_ctx(
        model,
        optimizer,
        copy_initial_weights=copy_initial_weights,
        override={"lr": lr, "momentum": momentum},
    ) as (fmodel, diffopt):
        for _ in range(5):
            diffopt.step(((fmodel(x) - y) ** 2).mean())

        meta_loss = ((fmodel.weight - 3.5) ** 2).sum()
        meta_loss.backward()

    print(f"copy_initial_weights={copy_initial_weights}")
    print("  weights:", *[f"{next(fmodel.parameters(time=t)).item():.4f}" for t in range(6)])
    print(f"  meta-loss: {meta_loss.item():.13f}")
    for name, tensor in [("lr", lr), ("momentum", momentum), ("model's weight", model.weight)]:
        gradient = tensor.grad
        print(f"  gradient of {name}:", None if gradient is None else f"{gradient.item():.6f}")

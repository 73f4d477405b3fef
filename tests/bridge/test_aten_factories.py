"""Tensors made inside a traced callable: torch's values, dtypes and shapes."""

import torch
from support import check


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_constant_tensors():
    def functions(x):
        return (
            (
                torch.zeros(2, 3),
                torch.ones(2),
                torch.full((2,), 7),
                torch.full((), 0.5),
                torch.eye(2),
            ),
            (torch.zeros_like(x), torch.ones_like(x, dtype=torch.int8), torch.full_like(x, 2)),
            (x.new_zeros(2), x.new_ones(()), x.new_full((3,), 1.5), x.new_tensor([1, 2])),
            (torch.eye(2, 3, dtype=torch.bool), torch.scalar_tensor(3.0), torch.tensor([[1, 2]])),
            (torch.empty(2, 0), torch.empty_like(x).shape, torch.tensor(2.5, dtype=torch.half)),
        )

    check(functions, randn(2, 3), order=0)


def test_sequences_are_torchs_to_the_last_bit():
    def functions(x):
        return (
            (torch.arange(5), torch.arange(1.0, 2.0, 0.1), torch.arange(5, 0, -2), x.new_tensor(1)),
            [
                torch.linspace(0, 1, 7, dtype=dtype)
                for dtype in (None, torch.double, torch.bfloat16)
            ],
            (torch.linspace(0, 10, 4, dtype=torch.int32), torch.logspace(0, 2, 5)),
            (torch.tril_indices(3, 4), torch.triu_indices(3, 4, 1)),
            (torch.hann_window(5), torch.hamming_window(6, periodic=False), torch.kaiser_window(4)),
            (torch.blackman_window(5), torch.bartlett_window(5)),
        )

    check(functions, randn(1), order=0, tolerance=0)


def test_filling():
    """The filled tensor has no gradient; what fills it has."""

    def functions(x):
        filled, zeroed, copied = x * 2, x * 2, x.new_empty(2, 3)
        filled.fill_(x[0, 0])
        zeroed.zero_()
        copied.copy_(x[0])
        return filled, zeroed, copied, (x * 2).fill_(3)

    check(lambda x: [y**2 for y in functions(x)], randn(2, 3))


def test_copies():
    check(
        lambda x: (x.clone() * x.detach(), x.contiguous(), x.data * x, torch.clone(x)), randn(2, 3)
    )

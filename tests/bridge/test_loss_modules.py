"""Every loss of torch.nn, converted: values, first and second gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_support import check_module
from torch import nn


def _x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


_A, _B = _x(3, 4), _x(3, 4, seed=1)
_LOGITS, _PROBABILITIES = _A, torch.softmax(_B, 1)
_CLASSES = torch.tensor([2, 0, 3])
_WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1])
_SIGNS = torch.tensor([1, -1, 1])

_CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "l1": (nn.L1Loss, (_A, _B)),
    "mse": (nn.MSELoss, (_A, _B)),
    "mse_sum": (lambda: nn.MSELoss(reduction="sum"), (_A, _B)),
    "mse_none": (lambda: nn.MSELoss(reduction="none"), (_A, _B)),
    "smooth_l1": (lambda: nn.SmoothL1Loss(beta=0.7), (_A, _B)),
    "huber": (lambda: nn.HuberLoss(delta=0.7), (_A, _B)),
    "cross_entropy": (nn.CrossEntropyLoss, (_LOGITS, _CLASSES)),
    "cross_entropy_options": (
        lambda: nn.CrossEntropyLoss(_WEIGHT, ignore_index=0, label_smoothing=0.1),
        (_LOGITS, _CLASSES),
    ),
    "cross_entropy_probabilities": (
        lambda: nn.CrossEntropyLoss(_WEIGHT, label_smoothing=0.1),
        (_LOGITS, _PROBABILITIES),
    ),
    "cross_entropy_images": (
        lambda: nn.CrossEntropyLoss(reduction="sum"),
        (_x(2, 4, 2, 1), torch.tensor([[[1], [3]], [[0], [0]]])),
    ),
    "nll": (lambda: nn.NLLLoss(_WEIGHT, ignore_index=2), (torch.log_softmax(_A, 1), _CLASSES)),
    "kl_div": (lambda: nn.KLDivLoss(reduction="sum"), (torch.log_softmax(_A, 1), _PROBABILITIES)),
    "kl_div_log": (
        lambda: nn.KLDivLoss(reduction="batchmean", log_target=True),
        (torch.log_softmax(_A, 1), torch.log_softmax(_B, 1)),
    ),
    "bce": (nn.BCELoss, (torch.sigmoid(_A), torch.sigmoid(_B))),
    "bce_with_logits": (
        lambda: nn.BCEWithLogitsLoss(_WEIGHT, pos_weight=_WEIGHT),
        (_A, torch.sigmoid(_B)),
    ),
    "gaussian_nll": (lambda: nn.GaussianNLLLoss(full=True), (_A, _B, torch.exp(_x(3, 4, seed=2)))),
    "poisson_nll": (lambda: nn.PoissonNLLLoss(full=True), (_A, torch.exp(_B))),
    "poisson_nll_no_log": (lambda: nn.PoissonNLLLoss(log_input=False), (torch.exp(_A), _B)),
    "soft_margin": (nn.SoftMarginLoss, (_x(3), _SIGNS)),
    "hinge_embedding": (lambda: nn.HingeEmbeddingLoss(margin=0.5), (_x(3), _SIGNS)),
    "margin_ranking": (lambda: nn.MarginRankingLoss(0.3), (_x(3), _x(3, seed=1), _SIGNS)),
    "cosine_embedding": (lambda: nn.CosineEmbeddingLoss(0.1), (_A, _B, _SIGNS)),
    "multi_margin": (lambda: nn.MultiMarginLoss(p=2, margin=0.7), (_LOGITS, _CLASSES)),
    "multilabel_margin": (nn.MultiLabelMarginLoss, (_A, torch.tensor([[1, 2, -1, 0]] * 3))),
    "multilabel_soft_margin": (nn.MultiLabelSoftMarginLoss, (_A, torch.sigmoid(_B))),
    "triplet": (lambda: nn.TripletMarginLoss(swap=True), (_A, _B, _x(3, 4, seed=2))),
    "triplet_distance": (
        lambda: nn.TripletMarginWithDistanceLoss(distance_function=nn.CosineSimilarity()),
        (_A, _B, _x(3, 4, seed=2)),
    ),
}


_FIRST_ORDER = {"multi_margin", "multilabel_margin"}  # all that torch has


@pytest.mark.parametrize("name", _CASES)
def test_loss(name):
    factory, inputs = _CASES[name]
    check_module(factory, *inputs, order=1 if name in _FIRST_ORDER else 2)

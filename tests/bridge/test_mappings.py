"""Compiled programs are dropped before Linux's limit on memory mappings is reached."""

import jax
import pytest
import torch

from jaxmeta_bridge import higher, mappings


def read_after_steps(count: int) -> torch.Tensor:
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, 0.5)
    torch.nn.init.constant_(model.bias, 0.0)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(count):
            diffopt.step((fmodel(torch.ones(1, 1)) ** 2).sum())
        fmodel.weight.sum().backward()
    assert model.weight.grad is not None
    return model.weight.grad


def test_caches_are_cleared_in_time(monkeypatch: pytest.MonkeyPatch):
    expected = [read_after_steps(count) for count in (1, 2, 3)]
    cleared = []
    clear = jax.clear_caches
    monkeypatch.setattr(mappings, "_EVERY", 1)
    monkeypatch.setattr(mappings, "_LIMIT", 1)
    monkeypatch.setattr(jax, "clear_caches", lambda: (cleared.append(1), clear()))
    torch.testing.assert_close([read_after_steps(count) for count in (1, 2, 3)], expected)
    read_after_steps(4)
    assert cleared


def test_few_mappings_clear_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mappings, "_EVERY", 1)
    monkeypatch.setattr(jax, "clear_caches", lambda: pytest.fail("cleared"))
    assert 0 < mappings._mappings() < mappings._LIMIT
    mappings.note_program()

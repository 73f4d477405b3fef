"""Who owns what has crossed the border: copies are private, sharing is by name."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmeta_bridge.dlpack import tensor_to_jax, tensor_to_torch
from jaxmeta_bridge.errors import ConversionError
from tests.bridge.tensors import assert_same, strided_views


@pytest.mark.parametrize("size", [3, 5_000_000])
def test_a_copy_does_not_see_later_changes_of_the_tensor(size):
    tensor = torch.zeros(size)
    array = tensor_to_jax(tensor)
    tensor += 1  # at once: a copy made later than the call would see this
    assert float(jnp.max(array)) == 0


@pytest.mark.parametrize("size", [3, 5_000_000])
def test_a_copy_of_an_array_is_the_users_own(size):
    array = jnp.zeros(size)
    tensor = tensor_to_torch(array)
    tensor += 1
    assert float(jnp.max(array)) == 0


def test_an_array_still_being_computed_is_waited_for():
    power = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda _, y: jnp.tanh(y @ x), x))
    x = jnp.full((500, 500), 0.01)
    expected = np.asarray(power(x))
    for share in (False, True):
        tensor = tensor_to_torch(power(x), share=share)  # dispatched, and not done yet
        np.testing.assert_array_equal(tensor.numpy(), expected)


def test_shared_with_jax():
    tensor = torch.arange(16.0)
    array = tensor_to_jax(tensor, share=True)
    assert_same(array, tensor)
    tensor[0] = 7
    assert array[0] == 7
    parameter = torch.nn.Parameter(tensor)
    assert tensor_to_jax(parameter, share=True).unsafe_buffer_pointer() == tensor.data_ptr()


def test_shared_with_torch():
    array = jnp.arange(16.0)
    tensor = tensor_to_torch(array, share=True)
    assert_same(array, tensor)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()


@pytest.mark.parametrize("name", [n for n in strided_views() if n != "offset into a storage"])
def test_what_cannot_be_shared_as_it_lies_is_refused(name):
    with pytest.raises(ConversionError, match="weight is a view.*contiguous"):
        tensor_to_jax(strided_views()[name], share=True, name="weight")


def test_unaligned_memory_is_not_shared_silently():
    tensor = torch.arange(100.0)[1:]
    assert tensor.data_ptr() % 64
    with pytest.raises(ConversionError, match=r"weight starts at an address.*tensor\.clone\(\)"):
        tensor_to_jax(tensor, share=True, name="weight")
    assert_same(tensor_to_jax(tensor), tensor)
    assert_same(tensor_to_jax(tensor.clone(), share=True), tensor)


def churn() -> None:
    gc.collect()
    for _ in range(20):
        torch.full((1000,), -1.0)
        jnp.full(1000, -1.0).block_until_ready()


def test_shared_memory_outlives_its_source():
    array = tensor_to_jax(torch.full((1000,), 3.0), share=True)
    tensor = tensor_to_torch(jnp.full(1000, 4.0), share=True)
    churn()
    assert float(array.min()) == float(array.max()) == 3
    assert float(tensor.min()) == float(tensor.max()) == 4


def test_a_shared_array_may_be_deleted_or_donated():
    deleted, donated = jnp.full(1000, 3.0), jnp.full(1000, 3.0)
    tensors = [tensor_to_torch(deleted, share=True), tensor_to_torch(donated, share=True)]
    deleted.delete()
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    churn()
    for tensor in tensors:
        assert float(tensor.min()) == float(tensor.max()) == 3

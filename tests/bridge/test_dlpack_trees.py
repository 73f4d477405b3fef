"""Trees across the border, and the leaves of them that are no tensors."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmeta_bridge.dlpack import tree_to_jax, tree_to_torch
from jaxmeta_bridge.dtypes import NARROWED, TO_TORCH
from jaxmeta_bridge.errors import ConversionError
from tests.bridge.tensors import assert_same

Pair = collections.namedtuple("Pair", "left right")


def test_trees_keep_their_structure():
    tree = {
        "dict": {"b": torch.ones(2), "a": torch.zeros(1)},
        "list": [torch.ones(1), (torch.ones(2, 2), None)],
        "pair": Pair(torch.arange(3, dtype=torch.int32), 4),
        "ordered": collections.OrderedDict(z=torch.ones(1), a=torch.zeros(1)),
        "numbers": (1, 2.5, True, 1j, None),
        "empty": ({}, [], ()),
    }
    arrays = tree_to_jax(tree)
    assert jax.tree.structure(arrays) == jax.tree.structure(tree)
    assert arrays["numbers"] == (1, 2.5, True, 1j, None)
    assert type(arrays["numbers"][2]) is bool
    assert isinstance(arrays["pair"], Pair)
    assert list(arrays["ordered"]) == ["z", "a"]
    back = tree_to_torch(arrays)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for array, tensor, original in zip(
        jax.tree.leaves(arrays), jax.tree.leaves(back), jax.tree.leaves(tree), strict=True
    ):
        if isinstance(original, torch.Tensor):
            assert_same(array, original)
            assert torch.equal(tensor, original)
            assert tensor.dtype == original.dtype
        else:
            assert array == tensor == original


def test_any_registered_class_is_a_tree():
    class Box:
        def __init__(self, content):
            self.content = content

    jax.tree_util.register_pytree_node(Box, lambda b: ((b.content,), None), lambda _, c: Box(*c))
    box = tree_to_jax(Box([torch.ones(2)]))
    assert_same(box.content[0], torch.ones(2))
    assert torch.equal(tree_to_torch(box).content[0], torch.ones(2))


def test_what_is_on_the_right_side_already_stays():
    array, tensor = jnp.ones(2), torch.ones(2)
    assert tree_to_jax([array])[0] is array
    assert tree_to_torch([tensor])[0] is tensor


def numpy_dtypes():
    return [dtype for dtype in TO_TORCH if TO_TORCH[dtype] not in NARROWED]


@pytest.mark.parametrize("dtype", numpy_dtypes(), ids=str)
def test_numpy_leaves(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    for view in (array, array.T, array[::-1], array[:, ::2], array[0, 0]):
        tensor = tree_to_torch([view])[0]
        assert tensor.dtype == TO_TORCH[dtype]
        assert tuple(tensor.shape) == view.shape
        assert_same(tree_to_jax([view])[0], tensor)
        np.testing.assert_array_equal(np.asarray(tree_to_jax([view])[0]), view)


def test_numpy_leaves_are_copied():
    array = np.zeros(3, np.float32)
    read_only = np.zeros(3, np.float32)
    read_only.flags.writeable = False
    ours, theirs = tree_to_torch([array, read_only]), tree_to_jax([array, read_only])
    array += 1
    for tree in (ours, theirs):
        assert float(max(leaf.max() for leaf in tree)) == 0


def test_numpy_leaves_are_shared_by_name():
    array = np.zeros(3, np.float32)
    tensor = tree_to_torch([array], share=True)[0]
    array += 1
    assert float(tensor.min()) == 1
    read_only = np.zeros(3, np.float32)
    read_only.flags.writeable = False
    for refused in (read_only, np.zeros((3, 3))[:, 0]):
        with pytest.raises(ConversionError, match=r"tree\[0\] is a read-only or strided"):
            tree_to_torch([refused], share=True)


def test_numpy_dtypes_that_neither_side_has():
    for array in (np.array(["a"]), np.zeros(2, ">f4"), np.array([object()]), np.zeros(2, "M8[s]")):
        with pytest.raises(ConversionError, match=r"tree\[0\] is a NumPy array of dtype"):
            tree_to_jax([array])
        with pytest.raises(ConversionError, match=r"tree\[0\] is a NumPy array of dtype"):
            tree_to_torch([array])


def test_errors_name_the_path():
    with pytest.raises(ConversionError, match=r"^batch\['x'\]\[0\] is torch\.float64"):
        tree_to_jax({"x": [torch.ones(2, dtype=torch.float64)]}, name="batch")
    with pytest.raises(ConversionError, match=r"^batch\['x'\]\[0\] is torch\.float64"):
        tree_to_jax({"x": [np.ones(2)]}, name="batch")
    with pytest.raises(ConversionError, match=r"^tree\.left\[1\] has layout torch\.sparse_coo"):
        tree_to_jax(Pair((1, torch.eye(2).to_sparse()), 0))
    with pytest.raises(ConversionError, match=r"^tree\['y'\] holds 4294967296"):
        tree_to_jax({"y": torch.tensor([2**32])}, int64="int32")
    with pytest.raises(ConversionError, match=r"^out\['n'\] has dtype int4"):
        tree_to_torch({"n": jnp.ones(2, jnp.int4)}, name="out")


@pytest.mark.parametrize("leaf", ["text", object(), torch.nn.Linear(1, 1)], ids=["str", "obj", "m"])
def test_other_leaves_are_refused(leaf):
    for convert in (tree_to_jax, tree_to_torch):
        with pytest.raises(ConversionError, match=r"tree\['a'\] is a \w+; expected a tensor"):
            convert({"a": leaf})

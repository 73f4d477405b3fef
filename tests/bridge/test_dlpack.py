"""Tensors across the border: values, dtypes and shapes exact, or an error."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jaxmeta_bridge import dlpack
from jaxmeta_bridge.dlpack import tensor_to_jax, tensor_to_torch, tree_to_torch
from jaxmeta_bridge.dtypes import NARROWED, TO_JAX
from jaxmeta_bridge.errors import ConversionError
from tests.bridge.tensors import assert_same, example, strided_views


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 3), (1,)])
@pytest.mark.parametrize("dtype", TO_JAX, ids=str)
def test_every_dtype_both_ways(dtype, shape):
    tensor = example(dtype, shape)
    array = tensor_to_jax(tensor)
    assert_same(array, tensor)
    assert not array.weak_type
    back = tensor_to_torch(array)
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert_same(array, back)


@pytest.mark.parametrize("dtype", [d for d in TO_JAX if d not in NARROWED], ids=str)
def test_32_bit_types_need_no_x64(dtype):
    assert_same(tensor_to_jax(example(dtype)), example(dtype))


@pytest.mark.parametrize("dtype", NARROWED, ids=str)
@pytest.mark.parametrize("share", [False, True])
def test_64_bit_types_are_refused_without_x64(dtype, share):
    with pytest.raises(ConversionError, match=r"batch is torch\.\w+, .*enable_x64\(True\)"):
        tensor_to_jax(example(dtype), share=share, name="batch")


def test_nothing_is_changed_in_special_values():
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38])
    assert_same(tensor_to_jax(tensor), tensor)


@pytest.mark.parametrize("name", strided_views())
def test_views(name):
    view = strided_views()[name]
    assert_same(tensor_to_jax(view), view)


def test_the_views_are_what_their_names_say():
    views = strided_views()
    assert views["conjugate"].is_conj()
    assert views["negative"].is_neg()
    assert views["expanded"].stride() == (0, 1)
    assert views["offset into a storage"].storage_offset() == 5


def test_tensors_in_a_graph_and_parameters_give_detached_copies():
    weight = torch.nn.Parameter(torch.randn(3))
    assert_same(tensor_to_jax(weight), weight)
    result = weight * 2
    assert_same(tensor_to_jax(result), result)


def test_a_subclass_with_ordinary_memory():
    class Named(torch.Tensor):
        pass

    tensor = torch.arange(3.0).as_subclass(Named)
    assert_same(tensor_to_jax(tensor), torch.arange(3.0))
    assert_same(tensor_to_jax(tensor, share=True), torch.arange(3.0))


# ---------------------------------------------------------------- int64


def test_int64_as_int32_if_every_value_fits():
    tensor = torch.tensor([-(2**31), 0, 2**31 - 1])
    assert_same(tensor_to_jax(tensor, int64="int32"), tensor.to(torch.int32))
    matrix = torch.arange(6).reshape(2, 3).T
    assert_same(tensor_to_jax(matrix, int64="int32"), matrix.to(torch.int32))
    with jax.enable_x64(True):
        assert_same(tensor_to_jax(tensor, int64="int32"), tensor.to(torch.int32))
    unsigned = torch.tensor([0, 2**32 - 1], dtype=torch.uint64)
    assert_same(tensor_to_jax(unsigned, int64="int32"), unsigned.to(torch.uint32))
    empty = torch.zeros(0, dtype=torch.int64)
    assert_same(tensor_to_jax(empty, int64="int32"), empty.to(torch.int32))


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40])
def test_int64_that_does_not_fit_is_named(value):
    with pytest.raises(ConversionError, match=rf"labels holds {value}, which torch\.int32 cannot"):
        tensor_to_jax(torch.tensor([1, value]), int64="int32", name="labels")


def test_int64_options():
    with pytest.raises(ConversionError, match="int64='int16'; expected"):
        tensor_to_jax(torch.zeros(2), int64="int16")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConversionError, match="Pass one of share and int64"):
        tensor_to_jax(torch.zeros(2, dtype=torch.int64), int64="int32", share=True)
    # No other dtype is concerned.
    assert_same(tensor_to_jax(torch.ones(2), int64="int32", share=True), torch.ones(2))


# ---------------------------------------------------------------- refusals


def strange_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls some of these prototypes
        eye = torch.eye(4)
        with FakeTensorMode():
            fake = torch.ones(2)
        return {
            "coo": (eye.to_sparse_coo(), r"sparse_coo.*\.to_dense\(\)"),
            "csr": (eye.to_sparse_csr(), r"sparse_csr.*\.to_dense\(\)"),
            "csc": (eye.to_sparse_csc(), r"sparse_csc.*\.to_dense\(\)"),
            "bsr": (eye.to_sparse_bsr((2, 2)), r"sparse_bsr.*\.to_dense\(\)"),
            "bsc": (eye.to_sparse_bsc((2, 2)), r"sparse_bsc.*\.to_dense\(\)"),
            "mkldnn": (eye.to_mkldnn(), r"_mkldnn.*\.to_dense\(\)"),
            "quantized": (
                torch.quantize_per_tensor(eye, 1.0, 0, torch.quint8),
                r"quint8.*\.dequantize\(\)",
            ),
            "per channel": (
                torch.quantize_per_channel(eye, torch.ones(4), torch.zeros(4), 0, torch.qint8),
                r"qint8.*\.dequantize\(\)",
            ),
            "meta": (torch.ones(2, device="meta"), r"meta device.*\.to_empty.*load its weights"),
            "nested": (
                torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
                "nested: .*to_padded_tensor",
            ),
            "jagged": (
                torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
                "nested: .*to_padded_tensor",
            ),
            "fake": (fake, "FakeTensor.*plain torch.Tensor"),
            "masked": (torch.masked.masked_tensor(eye, eye > 0), "MaskedTensor.*plain"),
            "lazy": (torch.nn.UninitializedParameter(), "run the lazy module once"),
            "complex32": (
                torch.ones(2, dtype=torch.complex32),
                "complex32, which has no JAX counterpart",
            ),
        }


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", strange_tensors())
def test_tensors_without_dense_values_are_refused(name, share):
    tensor, message = strange_tensors()[name]
    with pytest.raises(ConversionError, match=f"^weight .*{message}"):
        tensor_to_jax(tensor, share=share, name="weight")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of functionalize
def test_tensors_inside_torch_func_are_refused():
    message = "inside torch.func.*convert it outside"

    def convert(x):
        with pytest.raises(ConversionError, match=message):
            tensor_to_jax(x)
        return x.sum()

    torch.func.vmap(convert)(torch.ones(2, 3))
    torch.func.grad(convert)(torch.ones(3))
    torch.func.jvp(convert, (torch.ones(3),), (torch.ones(3),))
    torch.func.functionalize(convert)(torch.ones(3))


def test_other_objects_are_refused():
    with pytest.raises(ConversionError, match=r"x is a list; expected a torch\.Tensor"):
        tensor_to_jax([1.0], name="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConversionError, match=r"x is a ndarray; expected a jax\.Array"):
        tensor_to_torch(np.ones(2), name="x")  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about a JAX without a GPU")
def test_devices_that_jax_lacks():
    # There is no such tensor on this machine, so the check itself is asked.
    assert dlpack._foreign_device(torch.device("cpu")) is None
    cuda = dlpack._foreign_device(torch.device("cuda:0"))
    assert cuda is not None
    assert "on cuda:0, and this JAX has no GPU" in cuda
    assert "pip install 'jax[cuda13]'" in cuda
    assert "on mps:0" in str(dlpack._foreign_device(torch.device("mps:0")))


# ---------------------------------------------------------------- JAX arrays


def test_arrays_that_torch_lacks():
    with pytest.raises(ConversionError, match=r"x has dtype int4, which torch lacks.*\.astype"):
        tensor_to_torch(jnp.ones(3, jnp.int4), name="x")
    with pytest.raises(ConversionError, match=r"key<fry>.*jax\.random\.key_data"):
        tensor_to_torch(jax.random.key(0))
    assert_same(
        jax.random.key_data(jax.random.key(7)),
        tensor_to_torch(jax.random.key_data(jax.random.key(7))),
    )


def test_deleted_and_donated_arrays():
    deleted = jnp.ones(3)
    deleted.delete()
    donated = jnp.ones(3)
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    for array in (deleted, donated):
        with pytest.raises(ConversionError, match="params, .*has been deleted or donated"):
            tensor_to_torch(array, name="params")


def test_tracers():
    def convert(x):
        with pytest.raises(ConversionError, match="x is a tracer.*inside jit, grad or vmap"):
            tensor_to_torch(x, name="x")
        return x.sum()

    jax.jit(convert)(jnp.ones(3))
    jax.grad(convert)(jnp.ones(3))
    jax.vmap(convert)(jnp.ones((2, 3)))
    with pytest.raises(ConversionError, match="tree\\['w'\\] is a tracer"):
        jax.jit(lambda x: tree_to_torch({"w": x}))(jnp.ones(3))


def test_arrays_on_several_devices():
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxmeta_bridge.dlpack import tensor_to_torch
from jaxmeta_bridge.errors import ConversionError

mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
for spec in (PartitionSpec("x"), PartitionSpec()):
    array = jax.device_put(jnp.arange(4.0), NamedSharding(mesh, spec))
    try:
        tensor_to_torch(array, name="w")
    except ConversionError as error:
        assert "w lies on 2 devices" in str(error), error
    else:
        raise AssertionError("not refused")
    gathered = tensor_to_torch(jax.device_put(array, jax.devices()[0]))
    assert gathered.tolist() == [0, 1, 2, 3]
assert tensor_to_torch(jax.device_put(jnp.ones(2), jax.devices()[1])).tolist() == [1, 1]
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()

"""Which tensors have descriptors, and what those say."""

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from lact_kernels.triton.descriptors import aligned_strides, descriptor

X = torch.zeros(2, 6, 4, 16, dtype=torch.bfloat16)

DESCRIBABLE = {
    "contiguous": X,
    "heads first": X.transpose(1, 2).contiguous().transpose(1, 2),
    "half of the heads": X[:, :, 2:],
    "every second token": X[:, ::2],
    "half of the channels": X[..., 8:],
    "one row": X[:1],
    # The strides of an axis of one element are arbitrary.
    "one head of an odd stride": torch.zeros(2 * 6 * 16, dtype=X.dtype).as_strided(
        (2, 6, 1, 16), (96, 16, 7, 1)
    ),
    "one head that is expanded": X[:, :, :1].expand(2, 6, 1, 16),
}
NOT_DESCRIBABLE = {
    "no tokens": X[:, :0],
    "expanded heads": X[:, :, :1].expand(2, 6, 4, 16),
    "address at an odd place": X[..., 1:9],
    "rows of 20 bytes": torch.zeros(2, 6, 4, 10, dtype=X.dtype),
    "every second channel": X[..., ::2],
    "channels first": torch.zeros(2, 16, 6, 4, dtype=X.dtype).permute(0, 2, 3, 1),
    "one channel": torch.zeros(2, 6, 4, 1, dtype=X.dtype),
}


@pytest.mark.parametrize("name", DESCRIBABLE)
def test_describable(name):
    x = DESCRIBABLE[name]
    found = descriptor(x, aligned_strides(x), 32, 16)
    # What its constructor makes, and asserts.
    assert found == TensorDescriptor(x, found.shape, found.strides, found.block_shape)
    assert found.base.data_ptr() == x.data_ptr()
    assert found.shape == [x.shape[i] for i in (0, 2, 1, 3)] and found.block_shape == [1, 1, 32, 16]
    for axis, stride in zip((0, 2, 1, 3), found.strides):
        assert stride == x.stride(axis) or x.shape[axis] == 1
        assert axis == 3 or (stride > 0 and 2 * stride % 16 == 0)


@pytest.mark.parametrize("name", NOT_DESCRIBABLE)
def test_not_describable(name):
    assert aligned_strides(NOT_DESCRIBABLE[name]) is None

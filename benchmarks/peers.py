"""The operator and what people use in its place on a CPU, as functions without arguments that do one call.

Each maker returns such a function, or raises `Missing` with the reason why this machine has no such peer. All compute
the same output from the same numbers, but for the convolutions, which are there for their speed.
"""

import importlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dcnzoo.ops import dcnv4

from .shapes import Shape
from .timing import time_calls

POINTS = 9
CAPABILITIES = ('avx2', 'default')


class Missing(Exception):
    """A peer that is not installed or cannot do what is asked."""


@dataclass(frozen=True)
class Operands:
    """What one call works on."""

    shape: Shape
    value: Tensor
    offset_mask: Tensor
    grad_output: Tensor

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype = torch.float32) -> 'Operands':
        """Draws them from standard normal distributions: offsets of about a pixel, as trained networks have them."""
        generator = torch.Generator().manual_seed(0)
        sizes = (shape.channels, shape.packed, shape.channels)
        return cls(
            shape,
            *(
                torch.randn(shape.batch, shape.height, shape.width, size, generator=generator).to(dtype)
                for size in sizes
            ),
        )

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Offsets (N, H, W, G, 9, 2) as (x, y) and masks (N, H, W, G, 9), points x-outermost."""
        packed = self.offset_mask[..., : 3 * POINTS * self.shape.groups].unflatten(-1, (self.shape.groups, 3 * POINTS))
        return packed[..., : 2 * POINTS].unflatten(-1, (POINTS, 2)), packed[..., 2 * POINTS :]


Call = Callable[[], object]


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad_output: Tensor) -> Call:
    """A call that runs a function forward and backward to all of its inputs."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad_output)


def native(operands: Operands, backward: bool) -> Call:
    def function(value: Tensor, offset_mask: Tensor) -> Tensor:
        return dcnv4(value, offset_mask, groups=operands.shape.groups)

    inputs = [operands.value, operands.offset_mask]
    if backward:
        return with_gradients(function, inputs, operands.grad_output)
    return lambda: function(*inputs)


def composition(operands: Operands, backward: bool) -> Call:
    """`grid_sample` and a sum, which is what the published models fall back to without their CUDA operator."""
    shape = operands.shape
    n, height, width, groups = shape.batch, shape.height, shape.width, shape.groups
    tap_x = torch.arange(3).repeat_interleave(3) - 1.0
    tap_y = torch.arange(3).repeat(3) - 1.0
    grid_x = torch.arange(width).view(1, 1, width, 1, 1) + tap_x
    grid_y = torch.arange(height).view(1, height, 1, 1, 1) + tap_y

    def function(value: Tensor, offset_mask: Tensor) -> Tensor:
        offset, mask = Operands(shape, value, offset_mask, operands.grad_output).unpacked()
        x = (grid_x + offset[..., 0]) * (2 / width) + (1 / width - 1)
        y = (grid_y + offset[..., 1]) * (2 / height) + (1 / height - 1)
        grid = torch.stack((x, y), -1).permute(0, 3, 1, 2, 4, 5).reshape(n * groups, height * width, POINTS, 2)
        maps = value.view(n, height * width, groups, -1).permute(0, 2, 3, 1).reshape(n * groups, -1, height, width)
        samples = F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
        weights = mask.permute(0, 3, 1, 2, 4).reshape(n * groups, 1, height * width, POINTS)
        output = (samples * weights).sum(-1).view(n, shape.channels, height * width)
        return output.transpose(1, 2).reshape(n, height, width, shape.channels)

    inputs = [operands.value, operands.offset_mask]
    if backward:
        return with_gradients(function, inputs, operands.grad_output)
    return lambda: function(*inputs)


def _row_major(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Value, offsets as (y, x) and masks, channels first and points row by row, as DCNv2's operators take them."""
    offset, mask = operands.unpacked()
    order = torch.arange(POINTS).view(3, 3).t().reshape(-1)
    offset = offset[..., order, :].flip(-1).permute(0, 3, 4, 5, 1, 2).flatten(1, 3)
    mask = mask[..., order].permute(0, 3, 4, 1, 2).flatten(1, 2)
    return operands.value.permute(0, 3, 1, 2).contiguous(), offset.contiguous(), mask.contiguous()


def torchvision(operands: Operands, backward: bool) -> Call:
    """DCNv2 with a convolution whose weights add up the points: all of its cost that is not the operator's is small."""
    try:
        deform_conv2d = importlib.import_module('torchvision.ops').deform_conv2d
    except ImportError as error:
        raise Missing('torchvision is not installed') from error
    shape = operands.shape
    weight = torch.ones(shape.channels, 1, 3, 3)

    def function(value: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(value, offset, weight, padding=1, mask=mask)

    inputs = list(_row_major(operands))
    if backward:
        return with_gradients(function, inputs, operands.grad_output.permute(0, 3, 1, 2).contiguous())
    return lambda: function(*inputs)


def onnxruntime(operands: Operands, backward: bool) -> Call:
    """The standard's DeformConv of opset 22, depthwise with weights of 1, run by ONNX Runtime."""
    if backward:
        raise Missing('ONNX Runtime does not train')
    try:
        onnx, runtime = importlib.import_module('onnx'), importlib.import_module('onnxruntime')
    except ImportError as error:
        raise Missing(f'{error.name} is not installed') from error
    shape = operands.shape
    arrays = dict(zip(('value', 'offset', 'mask'), (t.numpy() for t in _row_major(operands)), strict=True))
    node = onnx.helper.make_node(
        'DeformConv',
        ['value', 'weight', 'offset', '', 'mask'],
        ['output'],
        kernel_shape=[3, 3],
        pads=[1, 1, 1, 1],
        group=shape.channels,
        offset_group=shape.groups,
    )
    kind = onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info(name, kind, array.shape) for name, array in arrays.items()]
    output = onnx.helper.make_tensor_value_info('output', kind, arrays['value'].shape)
    weight = onnx.numpy_helper.from_array(torch.ones(shape.channels, 1, 3, 3).numpy(), 'weight')
    graph = onnx.helper.make_graph([node], 'deform_conv', inputs, [output], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 22)], ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    try:
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    except Exception as error:  # of several types, private to the package
        raise Missing(f'ONNX Runtime {runtime.__version__} has no DeformConv') from error
    return lambda: session.run(None, arrays)[0]


def depthwise(size: int) -> Callable[[Operands, bool], Call]:
    """A depthwise convolution in channels_last, the static layer in place of the operator."""

    def make(operands: Operands, backward: bool) -> Call:
        channels = operands.shape.channels

        def function(value: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(value, weight, padding=size // 2, groups=channels)

        inputs = [operands.value.permute(0, 3, 1, 2), torch.randn(channels, 1, size, size, dtype=operands.value.dtype)]
        if backward:
            return with_gradients(function, inputs, operands.grad_output.permute(0, 3, 1, 2))
        return lambda: function(*inputs)

    return make


PEERS: dict[str, Callable[[Operands, bool], Call]] = {
    'composition': composition,
    'torchvision': torchvision,
    'onnxruntime': onnxruntime,
    'depthwise3': depthwise(3),
    'depthwise7': depthwise(7),
}


class Process:
    """The operator in a process of its own, whose kernels use another instruction set, driven from here."""

    def __init__(self, capability: str, threads: int):
        context = multiprocessing.get_context('spawn')
        self._connection, other = context.Pipe()
        before = os.environ.get('DCNZOO_CPU_CAPABILITY')
        os.environ['DCNZOO_CPU_CAPABILITY'] = capability
        try:
            self._process = context.Process(target=_serve, args=(other, threads), daemon=True)
            self._process.start()
        finally:
            if before is None:
                del os.environ['DCNZOO_CPU_CAPABILITY']
            else:
                os.environ['DCNZOO_CPU_CAPABILITY'] = before

    def call(self, shape: Shape, dtype: torch.dtype, backward: bool) -> Callable[[int], list[float]]:
        def time_there(count: int) -> list[float]:
            self._connection.send((shape, dtype, backward, count))
            answer = self._connection.recv()
            if isinstance(answer, str):
                raise Missing(answer)
            return answer

        return time_there

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def _serve(connection, threads: int) -> None:
    torch.set_num_threads(threads)
    calls: dict[tuple, Call] = {}
    while (request := connection.recv()) is not None:
        *key, count = request
        try:
            if tuple(key) not in calls:
                shape, dtype, backward = key
                calls[tuple(key)] = native(Operands.of(shape, dtype), backward)
            connection.send(time_calls(calls[tuple(key)], count, 'cpu'))
        except RuntimeError as error:
            connection.send(str(error).splitlines()[0])

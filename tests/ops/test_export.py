"""Exporters see standard operators, whose graphs other runtimes run, also at sizes that were not traced."""

import warnings

import onnx
import onnxruntime
import pytest
import torch

from dcnzoo.ops import dcnv4
from tests.ops.cases import Case, error


class Module(torch.nn.Module):
    def __init__(self, geometry):
        super().__init__()
        self.geometry = geometry

    def forward(self, value, offset_mask):
        return dcnv4(value, offset_mask, **self.geometry)


@pytest.mark.parametrize('dynamo', [False, True], ids=['traced', 'dynamo'])
@pytest.mark.parametrize(
    'arguments',
    [{}, {'stride': (2, 1), 'softmax': True, 'remove_center': True, 'offset_scale': 0.5}],
    ids=['plain', 'everything'],
)
def test_onnx(arguments, dynamo, tmp_path):
    case = Case('exported', 1, 8, 7, arguments=arguments)
    axes = {0: 'batch', 1: 'height', 2: 'width'}
    out_axes = {0: 'batch', 1: 'out_height', 2: 'out_width'}
    shapes = {'dynamic_shapes': (axes, out_axes if 'stride' in arguments else axes)}
    if not dynamo:
        shapes = {'dynamic_axes': {'value': axes, 'offset_mask': out_axes, 'output': out_axes}}
    path = tmp_path / 'dcnv4.onnx'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the tracing exporter is deprecated, and still what others call
        torch.onnx.export(
            Module(case.geometry),
            case.operands(torch.float32)[:2],
            path,
            input_names=['value', 'offset_mask'],
            output_names=['output'],
            opset_version=18,
            dynamo=dynamo,
            **shapes,
        )
    assert {node.domain for node in onnx.load(path).graph.node} == {''}
    session = onnxruntime.InferenceSession(path)
    for batch, height, width in ((1, 8, 7), (3, 12, 5)):
        value, offset_mask, _ = Case('run', batch, height, width, arguments=arguments).operands(torch.float32)
        (output,) = session.run(None, {'value': value.numpy(), 'offset_mask': offset_mask.numpy()})
        assert error(torch.from_numpy(output), dcnv4(value, offset_mask, **case.geometry)) < 2e-6

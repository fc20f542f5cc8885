"""Detectors and segmenters of transformers, small and random, before and after their attention is replaced."""

import inspect

import pytest
import torch

from dcnzoo.layers import MultiScaleDeformableAttention
from dcnzoo.ops import deform_attn
from tests.ops.cases import error

transformers = pytest.importorskip('transformers')

from dcnzoo.integrations.transformers import use_deform_attn  # noqa: E402

RESNET = {'embedding_size': 8, 'hidden_sizes': [8, 8, 16, 16], 'depths': [1, 1, 1, 1], 'layer_type': 'basic'}
SWIN = {'embed_dim': 8, 'depths': [1, 1, 1, 1], 'num_heads': [1, 2, 2, 4], 'window_size': 2}
STAGES = ['stage1', 'stage2', 'stage3', 'stage4']
IMAGE = {'pixel_values': torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))}


def deformable_detr():
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(**RESNET, out_features=STAGES[1:]), d_model=32, num_queries=9,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_labels=5,
    )  # fmt: skip
    return transformers.DeformableDetrForObjectDetection(config), IMAGE, 'logits'


def _rt_detr(config: str, model: str, **kwargs):
    backbone = transformers.RTDetrResNetConfig(**RESNET, out_features=STAGES[1:])
    config = getattr(transformers, config)(
        backbone_config=backbone, encoder_in_channels=RESNET['hidden_sizes'][1:], encoder_hidden_dim=32,
        encoder_ffn_dim=32, feat_strides=[8, 16, 32], d_model=32, num_queries=9, decoder_in_channels=[32] * 3,
        decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32, encoder_attention_heads=4, num_labels=5,
        anchor_image_size=None, **kwargs,
    )  # fmt: skip
    return getattr(transformers, model)(config), IMAGE, 'logits'


def rt_detr():
    return _rt_detr('RTDetrConfig', 'RTDetrForObjectDetection')


def rt_detr_v2():
    return _rt_detr('RTDetrV2Config', 'RTDetrV2ForObjectDetection')


def d_fine():
    """With as many points on each level as its authors give it: not the same number."""
    return _rt_detr('DFineConfig', 'DFineForObjectDetection', decoder_n_points=[3, 6, 3])


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN, out_features=STAGES), feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=2, decoder_layers=3, num_attention_heads=4,
        dim_feedforward=32, num_queries=9, num_labels=5,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config), IMAGE, 'masks_queries_logits'


def oneformer():
    config = transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN, out_features=STAGES), conv_dim=32, mask_dim=32, hidden_dim=32,
        encoder_feedforward_dim=32, encoder_layers=2, decoder_layers=3, num_attention_heads=4, dim_feedforward=32,
        num_queries=9, num_labels=5, is_training=False, task_seq_len=7, text_encoder_width=32,
    )  # fmt: skip
    return (
        transformers.OneFormerForUniversalSegmentation(config),
        {**IMAGE, 'task_inputs': torch.arange(14).view(2, 7)},
        'masks_queries_logits',
    )


@pytest.mark.parametrize(
    'build', [deformable_detr, rt_detr, rt_detr_v2, d_fine, mask2former, oneformer], ids=lambda build: build.__name__
)
def test_outputs_and_gradients_stay(build, monkeypatch):
    torch.manual_seed(0)
    model, inputs, name = build()
    model.eval()
    for parameter in model.parameters():  # offsets are zero or a fixed pattern at first
        torch.nn.init.normal_(parameter, std=0.1)
    keys = list(model.state_dict())

    def outputs():
        model.zero_grad()
        result = getattr(model(**inputs), name)
        result.square().mean().backward()
        offsets = [p.grad.clone() for key, p in model.named_parameters() if 'sampling_offsets' in key]
        return result.detach(), *offsets

    expected = outputs()
    assert len(expected) > 2
    calls = []
    monkeypatch.setattr(
        'dcnzoo.layers.deform_attn.deform_attn', lambda *operands: calls.append(1) or deform_attn(*operands)
    )
    assert use_deform_attn(model) is model
    actual = outputs()
    assert calls, 'the operator was not called'
    assert list(model.state_dict()) == keys
    assert error(actual[0], expected[0]) < 2e-5
    assert all(error(*pair) < 1e-3 for pair in zip(actual[1:], expected[1:], strict=True))
    assert torch.equal(getattr(use_deform_attn(model)(**inputs), name), actual[0])  # once more changes nothing


def test_a_model_without_deformable_attention():
    with pytest.raises(ValueError, match='Linear has no multi-scale deformable attention of transformers'):
        use_deform_attn(torch.nn.Linear(2, 2))


def test_the_call_is_that_of_the_kernel_layer():
    from transformers.models.deformable_detr import modeling_deformable_detr

    theirs, ours = (
        inspect.signature(layer.forward).parameters
        for layer in (modeling_deformable_detr.MultiScaleDeformableAttention, MultiScaleDeformableAttention)
    )
    assert [(name, parameter.kind) for name, parameter in ours.items()] == [
        (name, parameter.kind) for name, parameter in theirs.items()
    ]


def test_layer_takes_shapes_as_tensor_or_pairs():
    layer = MultiScaleDeformableAttention()
    value, where, weights = torch.randn(1, 16, 2, 8), torch.rand(1, 3, 2, 2, 4, 2), torch.rand(1, 3, 2, 2, 4)
    shapes = [(3, 4), (2, 2)]
    start = torch.tensor([0, 12])
    expected = layer(value, None, shapes, start, where, weights, 64)
    assert expected.shape == (1, 3, 16)
    assert torch.equal(layer(value, torch.tensor(shapes), None, start, where, weights), expected)
    assert not list(layer.state_dict())
    mixed = layer(value, None, shapes, start, where.bfloat16(), weights)  # what autocast may leave
    assert mixed.dtype == torch.float32 and error(mixed, expected) < 0.1


def test_fx_records_the_layer():
    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = MultiScaleDeformableAttention()

        def forward(self, value, where, weights):
            return self.attend(value, None, [(3, 4), (2, 2)], None, where, weights)

    operands = torch.randn(1, 16, 2, 8), torch.rand(1, 3, 2, 2, 4, 2), torch.rand(1, 3, 2, 2, 4)
    traced = torch.fx.symbolic_trace(Attend())
    assert torch.equal(traced(*operands), Attend()(*operands))

"""The dcnv4 models: published sizes, weights and outputs, and the options of their architecture."""

import math
import re

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torch.testing import assert_close

from dcnzoo.models.internimage import checkpoint_filter_fn

from .golden import KEYS, OUTPUTS, relative_error
from .golden.fill import fill, image
from .registry import create, parameter_count, randomize


@pytest.mark.parametrize(
    ('name', 'count'),
    [
        ('dcnv4_tiny', 29_815_528),
        ('dcnv4_small', 50_067_496),
        ('dcnv4_base', 97_448_960),
        ('dcnv4_large', 223_297_080),
    ],
)
def test_published_parameter_counts(name, count):
    assert parameter_count(name) == count


def test_own_parameter_counts():
    assert 3.3e6 < parameter_count('dcnv4_atto') < 3.8e6
    assert 14e6 < parameter_count('dcnv4_nano') < 16e6
    assert parameter_count('test_dcnv4') < 0.5e6


@pytest.mark.parametrize(('name', 'seed', 'batch'), [('dcnv4_tiny', 1, 2), ('dcnv4_small', 3, 1)])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@torch.no_grad()
def test_golden_outputs(published, name, seed, batch, dtype, tolerance):
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=published(name), dtype=dtype).eval()
    features, stages = model.forward_intermediates(image(seed, (batch, 3, 224, 224)).to(dtype))
    assert relative_error(model.forward_head(features), OUTPUTS[f'{name}.logits']) < tolerance
    for i, stage in enumerate(stages):
        assert relative_error(stage.mean((2, 3)), OUTPUTS[f'{name}.stage{i}.mean']) < tolerance
        assert relative_error(stage[0, :8, :3, :3], OUTPUTS[f'{name}.stage{i}.corner']) < tolerance


def published_layout(channels: int, depths: tuple[int, ...], biases: bool) -> dict[str, list[int]]:
    """Keys and shapes of a larger published file: dcnv4_small's, whose options it shares, and more biases if so."""

    def resized(key: str, shape: list[int]) -> list[int]:
        if '.offset_mask.' in key:  # 3 numbers for each of the 9 points of a group of 16 channels, padded to 8
            width = channels << int(key.split('.')[1])
            return [8 * math.ceil(27 * width / 16 / 8), *[width] * (len(shape) - 1)]
        return [size if size in (1, 3, 1000) else size * channels // 80 for size in shape]

    layout = {}
    for key, shape in KEYS['dcnv4_small'].items():
        shapes = {key: resized(key, shape)}
        if biases and key.endswith(('output_proj.weight', 'fc2.weight')):
            shapes[key.replace('weight', 'bias')] = shapes[key][:1]
        first = re.match(r'levels\.(\d)\.blocks\.0\.', key)
        if first:
            for i in range(depths[int(first[1])]):
                layout |= {key.replace('.blocks.0.', f'.blocks.{i}.'): shape for key, shape in shapes.items()}
        elif '.blocks.' not in key:
            layout |= shapes
    return layout


LAYOUTS = {
    'dcnv4_tiny': KEYS['dcnv4_tiny'],
    'dcnv4_small': KEYS['dcnv4_small'],
    'dcnv4_base': published_layout(112, (4, 4, 21, 4), biases=False),
    'dcnv4_large': published_layout(160, (5, 5, 22, 5), biases=True),
}


def test_layouts_of_larger_files_follow_from_that_of_small():
    assert published_layout(80, (4, 4, 21, 4), biases=False) == KEYS['dcnv4_small']


@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.parametrize('wrapped', [False, True])
def test_published_keys_map_onto_the_models(name, wrapped):
    with torch.device('meta'):
        model = timm.create_model(name)
        state_dict = {key: torch.empty(shape) for key, shape in LAYOUTS[name].items()}
    mapped = checkpoint_filter_fn({'model': state_dict} if wrapped else state_dict, model)
    assert len(mapped) == len(state_dict)
    assert {key: value.shape for key, value in mapped.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


@pytest.mark.parametrize('num_classes', [0, 5, 1000])
@pytest.mark.parametrize('in_chans', [1, 3])
@torch.no_grad()
def test_classes_and_channels_of_a_published_load(published, num_classes, in_chans):
    model = timm.create_model(
        'dcnv4_tiny',
        pretrained=True,
        pretrained_cfg_overlay=published('dcnv4_tiny'),
        num_classes=num_classes,
        in_chans=in_chans,
        dtype=torch.float64,
    ).eval()
    state_dict = fill(KEYS['dcnv4_tiny'])
    stem = state_dict['patch_embed.conv1.weight']
    assert_close(model.stem.conv1.weight, stem.sum(1, keepdim=True) if in_chans == 1 else stem)
    assert torch.equal(model.stages[2].blocks[17].mlp.fc1.weight, state_dict['levels.2.blocks.17.mlp.fc1.weight'])
    assert torch.equal(model.stages[3].downsample.conv.weight, state_dict['levels.2.downsample.conv.weight'])
    assert torch.equal(model.conv_head.bn.running_var, state_dict['conv_head.1.0.running_var'])
    if num_classes == 1000:
        assert torch.equal(model.head.fc.weight, state_dict['head.weight'])
    outputs = model(image(0, (1, in_chans, 32, 32)))
    assert outputs.shape == (1, num_classes or model.head_hidden_size)
    assert outputs.isfinite().all()


def test_features_of_a_published_load(published):
    model = timm.create_model(
        'dcnv4_tiny',
        pretrained=True,
        pretrained_cfg_overlay=published('dcnv4_tiny'),
        features_only=True,
        out_indices=(1, 3),
        dtype=torch.float64,
    ).eval()
    with torch.no_grad():
        outputs = model(image(1, (2, 3, 224, 224)))
    for i, output in zip((1, 3), outputs, strict=True):
        assert relative_error(output.mean((2, 3)), OUTPUTS[f'dcnv4_tiny.stage{i}.mean']) < 1e-9


def test_weights_of_another_size_are_refused(published):
    with pytest.raises(RuntimeError, match='size mismatch'):
        timm.create_model('dcnv4_small', pretrained=True, pretrained_cfg_overlay=published('dcnv4_tiny'))


@pytest.mark.parametrize(
    ('tag', 'filename', 'size'),
    [
        ('dcnv4_tiny.opengvlab_in1k', 'flash_intern_image_t_1k_224.pth', 224),
        ('dcnv4_small.opengvlab_in1k', 'flash_intern_image_s_1k_224.pth', 224),
        ('dcnv4_base.opengvlab_in1k', 'flash_intern_image_b_1k_224.pth', 224),
        ('dcnv4_large.opengvlab_in22k_ft_in1k_384', 'flash_internimage_l_22kto1k_384.pth', 384),
    ],
)
def test_published_tags(tag, filename, size):
    cfg = get_pretrained_cfg(tag)
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == ('OpenGVLab/DCNv4', filename)
    assert cfg.license == 'mit' and cfg.origin_url and cfg.num_classes == 1000
    assert cfg.input_size == (3, size, size) and cfg.pool_size == (size // 32, size // 32)
    assert tag in timm.list_pretrained()


@pytest.mark.parametrize('name', ['dcnv4_atto', 'dcnv4_nano', 'test_dcnv4'])
def test_models_without_weights_say_so(name):
    assert not any(tag.startswith(name) for tag in timm.list_pretrained())
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
        timm.create_model(name, pretrained=True)


def test_initialisation_is_the_published():
    model = timm.create_model('dcnv4_tiny')
    block = model.stages[0].blocks[0]
    assert not block.dcn.offset_mask.weight.any() and not block.dcn.offset_mask.bias.any()
    assert abs(block.mlp.fc1.weight.std().item() - 0.02) < 2e-3
    assert abs(model.head.fc.weight.std().item() - 0.02) < 2e-3
    assert not model.head.fc.bias.any()
    bound = (6 / (64 + 64)) ** 0.5
    assert 0.95 * bound < block.dcn.value_proj.weight.abs().max() <= bound
    small = timm.create_model('dcnv4_small')
    assert torch.all(small.stages[1].blocks[0].ls1.gamma == 1e-5)


OPTIONS = {
    'post_norm': dict(post_norm=True, layer_scale=1e-1, dw_kernel_size=3),
    'res_post_norm': dict(res_post_norm=True, dw_kernel_size=5, center_feature_scale=True),
    'level2_post_norm': dict(post_norm=True, depths=(1, 1, 3, 1), level2_post_norm_block_ids=(0, 2)),
    'biases': dict(dcn_output_bias=True, mlp_fc2_bias=True, mlp_ratio=3.0, offset_scale=2.0),
    'clip_projector': dict(use_clip_projector=True, center_feature_scale=True, post_norm=True),
    'dilated': dict(output_stride=8, dw_kernel_size=3),
    'three_stages': dict(depths=(1, 1, 1), groups=(1, 2, 4)),
}


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_options(options):
    model = create('test_dcnv4', num_classes=7, **options)
    x = image(0, (2, 3, 72, 88)).float()
    expected = model(x)
    assert expected.shape == (2, 7)
    tolerance = dict(rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert_close(torch.jit.script(model)(x), expected, **tolerance)
    assert_close(torch.fx.symbolic_trace(model)(x), expected, **tolerance)
    features, _ = model.forward_intermediates(x)
    assert features.shape[1] == model.num_features
    assert_close(model.forward_head(features), expected, **tolerance)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.set_grad_checkpointing()
    checkpointed = model(x)
    assert_close(checkpointed, expected, **tolerance)
    checkpointed.square().mean().backward()
    for key, parameter in model.named_parameters():
        # A pooling of keys by attention does not feel a shift that all keys share.
        assert parameter.grad is not None and (parameter.grad.any() or key == 'head.global_pool.k.bias'), key
    model.reset_classifier(0, '')
    assert model(x).shape == features.shape


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(layer_scale=0.5),
        dict(post_norm=True),
        dict(post_norm=True, layer_scale=0.5),
        dict(res_post_norm=True),
        dict(post_norm=True, center_feature_scale=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_stage_is_the_published_formula(options):
    """A stage spelled out with the letters of the papers: pre-norm, post-norm, both; scaled or not."""
    ids = (1,)
    model = create('test_dcnv4', depths=(1, 1, 2, 1), level2_post_norm_block_ids=ids, **options).double()
    stage = model.stages[2]
    x = image(0, (2, 32, 12, 10))
    expected = stage.downsample(x).permute(0, 2, 3, 1)
    for i, block in enumerate(stage.blocks):
        branches = (
            (block.dcn, block.norm1, 'res_post_norm1', 'ls1'),
            (block.mlp, block.norm2, 'res_post_norm2', 'ls2'),
        )
        for operator, norm, res_post_norm, scale in branches:
            if options.get('post_norm'):
                branch = norm(operator(expected))
            elif options.get('res_post_norm'):
                branch = getattr(block, res_post_norm)(operator(norm(expected)))
            else:
                branch = operator(norm(expected))
            gamma = getattr(block, scale).gamma if 'layer_scale' in options else 1
            expected = expected + gamma * branch
        if i in ids:
            expected = block.output_norm(expected)
    if not options.get('post_norm') or options.get('center_feature_scale'):
        expected = stage.norm(expected)
    else:
        assert isinstance(stage.norm, torch.nn.Identity)
    assert_close(stage(x), expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize('options', [{}, dict(post_norm=True, dw_kernel_size=3)], ids=str)
@torch.no_grad()
def test_dilation_samples_the_same_network_more_densely(options):
    """With whole offsets every pixel that the undilated network computes reappears in the dilated one's finer maps."""
    features = {}
    for output_stride in (32, 16, 8):
        model = create('test_dcnv4', output_stride=output_stride, **options).double()
        for module in model.modules():
            if hasattr(module, 'offset_mask'):
                module.offset_mask.weight.mul_(0)
                module.offset_mask.bias.copy_((module.offset_mask.bias * 40).round())
        features[output_stride] = model.forward_intermediates(image(0, (1, 3, 128, 192)), intermediates_only=True)
    for output_stride in (16, 8):
        for coarse, fine in zip(features[32], features[output_stride], strict=True):
            step = fine.shape[2] // coarse.shape[2]
            assert_close(fine[:, :, ::step, ::step], coarse)
    assert features[8][3].shape[2:] == (16, 24)


@torch.no_grad()
def test_clip_projector_is_the_published_formula():
    model = create('test_dcnv4', use_clip_projector=True, num_classes=3).double()
    *_, x3, x4 = model.forward_intermediates(image(0, (2, 3, 96, 64)), intermediates_only=True)
    fused = torch.nn.functional.pixel_shuffle(model.conv_head.coarse(x4), 2) + model.conv_head.fine(x3)
    assert_close(model.conv_head(x3, x4), fused)

    pool = model.head.global_pool
    tokens = fused.flatten(2).transpose(1, 2)
    q = pool.q(pool.norm_q(tokens.mean(1, keepdim=True))).view(2, 1, 16, 64).transpose(1, 2)
    k = pool.k(pool.norm_k(tokens)).view(2, -1, 16, 64).transpose(1, 2)
    v = pool.v(pool.norm_v(tokens)).view(2, -1, 16, 64).transpose(1, 2)
    attention = (q * 64**-0.5 @ k.transpose(-2, -1)).softmax(-1)
    pooled = pool.proj((attention @ v).transpose(1, 2).reshape(2, -1))
    expected = model.head.fc(model.head.norm(pooled))
    assert_close(model(image(0, (2, 3, 96, 64))), expected)

    with pytest.raises(ValueError, match="global_pool of a clip projector must be 'avg' or '', got 'max'"):
        model.reset_classifier(3, 'max')
    model.reset_classifier(0, '')
    with pytest.raises(ValueError, match='taken away'):
        model.reset_classifier(3, 'avg')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(groups=(3, 3, 3, 3)), 'group must divide the 16 channels, got 3'),
        (dict(depths=(1, 0, 1, 1)), r'depths must be positive, one number per stage, got \(1, 0, 1, 1\)'),
        (dict(depths=(1, 1, 1)), r'depths and groups must be equally long, got \(1, 1, 1\) and \(1, 2, 4, 8\)'),
        (dict(post_norm=True, res_post_norm=True), 'post_norm and res_post_norm exclude each other'),
        (dict(use_clip_projector=True, output_stride=16), 'use_clip_projector needs output_stride 32, got 16'),
        (dict(level2_post_norm_block_ids=(3,)), r'level2_post_norm_block_ids .* got \(3,\)'),
        (dict(dw_kernel_size=4), 'dw_kernel_size must be a positive odd int or None, got 4'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_dcnv4', **options)


def test_stochastic_depth_rises_linearly():
    model = timm.create_model('dcnv4_atto', drop_path_rate=0.11)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path2, 'drop_prob', 0.0) for block in blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


@torch.no_grad()
def test_maps_stay_channels_last():
    """Nothing between the stem and the head moves values for the sake of a layout."""
    model = randomize(timm.create_model('test_dcnv4', dw_kernel_size=3)).eval()
    moved = []
    for name, module in model.named_modules():
        if name.startswith(('stages', 'conv_head')):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: (
                    moved.append(name)
                    if not (output.is_contiguous() or output.is_contiguous(memory_format=torch.channels_last))
                    else None
                )
            )
    model(image(0, (2, 3, 64, 64)).float())
    assert not moved

"""The network with its weights to start from, and its optimizer, by timm's names."""

import fnmatch
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, muon, param_groups_layer_decay, param_groups_weight_decay
from timm.task import TrainingTask
from timm.utils import ModelEmaV3
from torch import nn

from ..hub import explain
from .config import DataConfig, ModelConfig, OptimConfig
from .errors import TrainError, nearest


@dataclass
class Network:
    """What is trained.

    Args:
        model: as prepared by accelerate, which may have wrapped it.
        plain: the same without a wrapper.
        task: timm's task with the prepared model: the loss.
        ema: timm's average of the plain model, or None.
        frozen: modules that stay in evaluation mode.
        config: content of config.json, in timm's form.
    """

    model: nn.Module
    plain: nn.Module
    task: TrainingTask
    ema: ModelEmaV3 | None
    frozen: list[nn.Module]
    config: dict

    @property
    def published(self) -> nn.Module:
        """The module that is validated and published: the average where there is one."""
        return self.plain if self.ema is None else self.ema.module

    def train(self) -> None:
        self.model.train()
        for module in self.frozen:
            module.eval()


def build_model(model: ModelConfig, data: DataConfig, num_classes: int) -> nn.Module:
    """Creates the network, with pretrained weights or those of a file if the configuration says so.

    Raises:
        TrainError: if the model is unknown, or does not take these arguments or weights.
    """
    _check_name(model.name)
    size = data.image_size
    overlay = {'file': str(Path(model.checkpoint).resolve())} if model.checkpoint else None
    kwargs = dict(model.kwargs)
    try:
        if _has_fixed_size(model.name):
            if data.train_image_size not in (None, size):
                raise ValueError(
                    'it takes one image size, data.train_image_size should not differ from data.image_size'
                )
            if size is not None:
                kwargs.setdefault('img_size', size)
        network = timm.create_model(
            model.name,
            pretrained=model.pretrained or overlay is not None,
            pretrained_cfg_overlay=overlay,
            num_classes=num_classes,
            in_chans=model.in_chans,
            drop_rate=model.drop_rate,
            drop_path_rate=model.drop_path_rate,
            **kwargs,
        )
    except Exception as error:  # a constructor, a download or a file of others: each fails in its own way
        source = f' with the weights of {model.checkpoint}' if overlay else ''
        reason = textwrap.shorten(explain(error), 300, placeholder=' ...')
        raise TrainError(f'model.name {model.name!r} cannot be created{source}: {reason}') from error
    if model.grad_checkpointing:
        network.set_grad_checkpointing(True)
    if model.sync_bn:
        network = convert_sync_batchnorm(network)
    return network


def freeze(network: nn.Module, model: ModelConfig) -> list[nn.Module]:
    """Stops the learning of what the configuration keeps as it is.

    Returns:
        The modules that have to stay in evaluation mode: they keep their statistics and drop nothing.

    Raises:
        TrainError: if a pattern matches no module, or nothing is left to learn.
    """
    frozen = []
    for pattern in model.freeze:
        matches = [module for name, module in network.named_modules() if name and fnmatch.fnmatch(name, pattern)]
        if not matches:
            names = [name for name, _ in network.named_modules() if name]
            raise TrainError(f'model.freeze: no module is called {pattern!r}{nearest(pattern, names)}')
        frozen += matches
    if model.head_only:
        frozen.append(network)
    if model.freeze_bn:
        frozen += [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in frozen:
        module.requires_grad_(False)
    if model.head_only:
        network.get_classifier().requires_grad_(True)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise TrainError('model.freeze leaves nothing to train')
    return frozen


def _check_name(name: str) -> None:
    source, colon, path = name.partition(':')
    if colon:
        if source not in ('hf-hub', 'local-dir'):
            raise TrainError(f'model.name: expected a model, hf-hub:ORG/NAME or local-dir:DIR, got {name!r}')
        if source == 'local-dir' and not (Path(path) / 'config.json').is_file():
            raise TrainError(f'model.name: no config.json in the folder {path}')
    elif not timm.is_model(name.split('.')[0]):
        raise TrainError(f'model.name: unknown model {name!r}{nearest(name, timm.list_models())}')


def _has_fixed_size(name: str) -> bool:
    cfg = None if ':' in name else timm.models.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)


def input_config(model: nn.Module, data: DataConfig, in_chans: int) -> dict:
    """timm's description of the network's input, with what the configuration changes of it."""
    cfg = dict(model.pretrained_cfg)
    size = data.image_size or tuple(cfg.get('input_size') or (in_chans, 224, 224))[1:]
    height, width = (size, size) if isinstance(size, int) else size
    for key in ('mean', 'std'):  # statistics of the colours, for a network of other channels
        if cfg.get(key) and len(cfg[key]) != in_chans:
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * in_chans
    overrides = {key: getattr(data, key) for key in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}
    for key in ('mean', 'std'):
        if overrides[key] is not None and len(overrides[key]) not in (1, in_chans):
            raise TrainError(f'data.{key} should have 1 or {in_chans} values, got {len(overrides[key])}')
    return resolve_data_config({**overrides, 'input_size': (in_chans, height, width)}, pretrained_cfg=cfg)


def compile_model(model: nn.Module, config: ModelConfig) -> None:
    """Has torch.compile take the model's calls from now on; its names and weights stay as they are.

    Raises:
        TrainError: if there is no such backend.
    """
    backend = config.compile_backend
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise TrainError(f'model.compile_backend: unknown backend {backend!r}{nearest(backend, known)}')
    model.compile(backend=backend)


def build_optimizer(model: nn.Module, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """Creates timm's optimizer with its parameter groups: no weight decay where none belongs, layer decay if asked for.

    Raises:
        TrainError: if the optimizer is unknown or does not take these arguments, or a pattern matches no parameter.
    """
    optional = {key: getattr(optim, key) for key in ('betas', 'eps') if getattr(optim, key) is not None}
    if optim.groups:
        optional['param_group_fn'] = partial(grouped_parameters, optim=optim)
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=optim.name,
            lr=lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay,
            **optional,
            **optim.kwargs,
        )
    except (ValueError, TypeError, AssertionError) as error:
        known = timm.optim.list_optimizers()
        hint = nearest(optim.name, known) if optim.name not in known else f': {error}'
        raise TrainError(f'optim.name: cannot create {optim.name!r}{hint}', usage=True) from None
    if isinstance(optimizer, muon.Muon) and next(model.parameters()).device.type == 'cpu':
        orthogonalize_in_float32(optimizer)
    return optimizer


def orthogonalize_in_float32(optimizer: muon.Muon) -> None:
    """Has the updates of timm's Muon computed in float32 instead of bfloat16, of which it leaves no choice.

    Processors without instructions for bfloat16 take 25 times as long with it.
    """
    name = 'zeropower_via_newtonschulz'
    theirs = getattr(muon, name)
    ours = partial(theirs, dtype=torch.float32)
    optimizer.register_step_pre_hook(lambda *_: setattr(muon, name, ours))
    optimizer.register_step_post_hook(lambda *_: setattr(muon, name, theirs))


def grouped_parameters(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """timm's parameter groups, divided where optim.groups gives some parameters settings of their own."""
    excluded = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    if optim.layer_decay is not None:
        groups = param_groups_layer_decay(model, optim.weight_decay, excluded, layer_decay=optim.layer_decay)
    else:
        groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=excluded)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for pattern, settings in optim.groups.items():
        if unknown := set(settings) - {'lr_scale', 'weight_decay'}:
            raise TrainError(
                f'optim.groups: {pattern!r} takes lr_scale and weight_decay, not {min(unknown)}', usage=True
            )
        if not fnmatch.filter(names.values(), pattern):
            raise TrainError(f'optim.groups: no parameter matches {pattern!r}{nearest(pattern, names.values())}')
    divided: dict[tuple, dict] = {}
    for number, group in enumerate(groups):
        for parameter in group['params']:
            pattern = next(
                (each for each in reversed(optim.groups) if fnmatch.fnmatch(names[id(parameter)], each)), None
            )
            settings = {} if pattern is None else dict(optim.groups[pattern])
            if 'lr_scale' in group or 'lr_scale' in settings:
                settings['lr_scale'] = group.get('lr_scale', 1.0) * settings.get('lr_scale', 1.0)
            if group['weight_decay'] == 0.0:  # a bias, or a norm
                settings.pop('weight_decay', None)
            divided.setdefault((number, pattern), {**group, 'params': [], **settings})['params'].append(parameter)
    return list(divided.values())

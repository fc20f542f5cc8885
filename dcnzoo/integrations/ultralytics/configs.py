"""Configurations of YOLO models with our blocks, made from the YAML files of the installed ultralytics."""

import copy
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from ultralytics.utils import ROOT, USER_CONFIG_DIR

from ...layers._geometry import check_positive
from .blocks import TimmBackbone
from .registration import check_block, nearest

_YAMLS = ROOT / 'cfg' / 'models'


@dataclass(frozen=True)
class Row:
    """A row of a configuration, as a filter sees it.

    Attributes:
        section: 'backbone' or 'head'.
        index: Position among all rows.
        module: Name of the row's module.
        args: The row's arguments.
        stride: 2 where the row halves its input's size, else 1.
        level: 3 for maps of an eighth of the image's size (P3), 4 for a sixteenth, and so on.
    """

    section: str
    index: int
    module: str
    args: tuple
    stride: int
    level: int


@dataclass(frozen=True)
class Variant:
    """A named replacement of blocks: which by which, and in which rows."""

    summary: str
    blocks: Mapping[str, str]
    where: Callable[[Row], bool] = lambda row: True


VARIANTS: dict[str, Variant] = {
    'dcnv4-backbone': Variant(
        'DCNv4 in the backbone, at strides 8, 16 and 32',
        {'C2f': 'C2f_DCNv4', 'C3k2': 'C3k2_DCNv4'},
        lambda row: row.section == 'backbone' and row.level >= 3,
    ),
    'dcnv4-head': Variant(
        'DCNv4 in the head',
        {'C2f': 'C2f_DCNv4', 'C3k2': 'C3k2_DCNv4'},
        lambda row: row.section == 'head',
    ),
    'c2f-dcnv4': Variant('DCNv4 in every C2f', {'C2f': 'C2f_DCNv4'}),
    'c3k2-dcnv4': Variant('DCNv4 in every C3k2', {'C3k2': 'C3k2_DCNv4'}),
    'dynamicconv': Variant(
        'dynamic convolution for every down-sampling but the stem',
        {'Conv': 'DynamicConv'},
        lambda row: row.stride == 2 and row.index > 0,
    ),
    'c2f-dynamicconv': Variant('dynamic ghost modules in every C2f', {'C2f': 'C2f_DynamicConv'}),
    'c3k2-dynamicconv': Variant('dynamic convolution in every C3k2', {'C3k2': 'C3k2_DynamicConv'}),
}


class ModelConfig(dict):
    """A model's configuration, which `YOLO` takes.

    YOLO takes the path of a YAML file, by `str`; so that is what `str` gives, of a file in ultralytics' folder of
    settings that is written with it. `DetectionModel` and its like take the mapping itself.
    """

    def __init__(self, config: Mapping, name: str):
        super().__init__(config)
        self.name = name

    def __str__(self) -> str:
        digest = hashlib.sha256(self._text().encode()).hexdigest()[:8]
        return str(self.save(USER_CONFIG_DIR / 'dcnzoo' / digest / f'{self.name}.yaml'))

    def __reduce__(self):
        return dict, (dict(self),)  # what keeps a configuration, a checkpoint for instance, keeps a plain mapping

    def save(self, path: str | Path) -> Path:
        """Writes the configuration as a YAML file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f'{path.name}.{os.getpid()}')
        part.write_text(self._text(), encoding='utf-8')
        return part.replace(path)

    def _text(self) -> str:
        return yaml.safe_dump(dict(self), sort_keys=False, default_flow_style=None)


def model_config(
    base: str,
    variant: str | Mapping[str, str] | None = None,
    nc: int | None = None,
    *,
    where: Callable[[Row], bool] | None = None,
    backbone: str | None = None,
    pretrained: bool = False,
) -> ModelConfig:
    """Makes the configuration of a YOLO model with our blocks, or on a timm backbone.

    Args:
        base: A model of ultralytics with its scale, 'yolov8n' to 'yolo11x', and a task other than detection behind it:
            'yolo11n-seg', '-cls', '-pose', '-obb'.
        variant: A name out of `VARIANTS`, or a mapping from names of the base's modules to names of blocks; None for
            the base's own.
        nc: Number of classes; that of the base's YAML file by default.
        where: In which rows a mapping replaces; in all by default.
        backbone: A name of timm's registry: that model with its maps at strides 8, 16 and 32 stands for the backbone,
            but for what follows the last C2f or C3k2 there.
        pretrained: Fetch the backbone's published weights when a model is made from this configuration; one that is
            rebuilt from a checkpoint has them from there.

    Returns:
        A mapping that `YOLO` takes, as do `DetectionModel` and its like.

    Raises:
        ValueError: There is no such base, variant, block or backbone, the base lacks what to replace, or arguments do
            not go together.
    """
    if nc is not None:
        check_positive(nc=nc)
    if pretrained and backbone is None:
        raise ValueError(f'pretrained goes with a backbone, got {pretrained!r} without one')
    config = _read(base)
    parts = [base]
    if variant is not None:
        replacement = _resolve(variant, where)
        if isinstance(variant, Mapping):  # the named ones serve families with different modules
            _check_present(variant, config, base)
        config = _replace(config, replacement, base)
        parts.append(variant if isinstance(variant, str) else '-'.join(sorted(set(variant.values()))))
    elif where is not None:
        raise ValueError('where goes with a mapping as variant')
    if backbone is not None:
        config = _on_timm(config, backbone, pretrained)
        parts.append(backbone)
    if nc is not None:
        config['nc'] = nc
    return ModelConfig(config, '-'.join(parts))


def config_by_name(name: str) -> ModelConfig:
    """Makes a configuration from one name: 'yolo11n-c3k2-dcnv4', or 'yolo11n+dcnv4_atto' for a timm backbone.

    Raises:
        ValueError: As `model_config`.
    """
    name, _, backbone = name.partition('+')
    variant = max((variant for variant in VARIANTS if name.endswith(f'-{variant}')), key=len, default=None)
    if variant:
        base = name.removesuffix(f'-{variant}')
    elif backbone:
        base = name
    else:
        base, _, variant = name.partition('-')  # none that there is, as the error will say
    return model_config(base, variant, backbone=backbone or None)


def bases() -> list[str]:
    """The YOLOv8 and YOLO11 models, with tasks and without scales: 'yolov8', 'yolov8-seg' and so on."""
    return sorted(
        path.stem
        for path in _YAMLS.rglob('yolo*.yaml')
        if re.fullmatch(r'yolo(v8|11)(-(seg|cls|pose|obb))?', path.stem)
    )


def scales(base: str) -> list[str]:
    """The scales of a base without one, 'yolo11' or 'yolo11-seg' for instance."""
    (path,) = _YAMLS.rglob(f'{base}.yaml')
    return list(yaml.safe_load(path.read_text(encoding='utf-8'))['scales'])


def _read(base: str) -> dict:
    """The configuration of one of ultralytics' models, with its own scale only."""
    match = re.fullmatch(r'(yolov?\d+)([a-z])(-.+)?', base.removesuffix('.yaml')) if isinstance(base, str) else None
    family, scale, task = match.groups(default='') if match else ('', '', '')
    path = next(_YAMLS.rglob(f'{family}{task}.yaml'), None)
    config = yaml.safe_load(path.read_text(encoding='utf-8')) if path else {}
    if scale not in config.get('scales', {}):
        names = [re.sub(r'(\d+)', rf'\1{scale}', name, count=1) for name in bases() for scale in scales(name)]
        raise ValueError(f'base must be a model of ultralytics with its scale, got {base!r}{nearest(base, names)}')
    config['scales'] = {scale: config['scales'][scale]}
    return {**config, 'scale': scale}


def _resolve(variant: str | Mapping[str, str], where: Callable[[Row], bool] | None) -> Variant:
    if isinstance(variant, Mapping):
        if not variant:
            raise ValueError(f'variant must say which blocks to replace, got {variant!r}')
        for block in variant.values():
            check_block(block)
        return Variant('', variant, where or (lambda row: True))
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(
            f'variant must be one of {", ".join(VARIANTS)} or a mapping, got {variant!r}{nearest(variant, VARIANTS)}'
        )
    if where is not None:
        raise ValueError(f'where goes with a mapping as variant, got it with {variant!r}')
    return VARIANTS[variant]


def _check_present(names: Iterable[str], config: Mapping, base: str) -> None:
    """Raises ValueError where one of the names is that of no row."""
    present = {row.module for row in rows(config)}
    for name in names:
        if name not in present:
            raise ValueError(
                f'{base} has no {name} to replace, only {", ".join(sorted(present))}{nearest(name, present)}'
            )


def _replace(config: dict, variant: Variant, base: str) -> dict:
    """The configuration with a variant's blocks."""
    config = copy.deepcopy(config)
    described = rows(config)
    chosen = [
        row for row in described if row.module in variant.blocks and variant.where(row) and not _has_attention(row)
    ]
    if not chosen:
        wanted = ' or '.join(map(str, variant.blocks))
        others = {row.module for row in described} - set(variant.blocks)
        raise ValueError(f'{base} has no {wanted} to replace there{nearest(wanted, others)}')
    sequence = config['backbone'] + config['head']
    for row in chosen:
        sequence[row.index][2] = variant.blocks[row.module]
    return config


def _has_attention(row: Row) -> bool:
    """Whether a C3k2 has attention in it (YOLO26), for which there is no counterpart."""
    return row.module == 'C3k2' and len(row.args) > 3 and row.args[3] is True


def rows(config: Mapping) -> list[Row]:
    """The rows of a configuration with their places in the pyramid."""
    found: list[Row] = []
    for section in ('backbone', 'head'):
        for source, _, module, args in config[section]:
            source = source[0] if isinstance(source, list) else source
            level = found[source].level if found else 0
            stride = 2 if module.endswith('Conv') and args[2:3] == [2] else 1
            level += stride - 1
            if module == 'nn.Upsample':
                level -= 1
            found.append(Row(section, len(found), module, tuple(args), stride, level))
    return found


def _on_timm(config: dict, backbone: str, pretrained: bool) -> dict:
    """The configuration with a timm model in place of all stages of the backbone; what follows them there stays."""
    described = [row for row in rows(config) if row.section == 'backbone']
    last_stage = max(row.index for row in described if row.stride == 2) + 1
    channels = _channels(backbone)
    begin = [[-1, 1, 'TimmBackbone', [channels[-1], backbone, pretrained]]]
    begin += [[0, 1, 'Index', [width, position]] for position, width in enumerate(channels)]

    def moved(source: int | list[int]) -> int | list[int]:
        if isinstance(source, list):
            return [moved(one) for one in source]
        if source < 0:
            return source
        if source > last_stage:
            return source - (last_stage + 1) + len(begin)
        if described[source].level not in (3, 4, 5):
            raise ValueError(f'base must take maps at strides 8, 16 and 32 only, not at {2 ** described[source].level}')
        return described[source].level - 2  # the Index row of that level

    head = [[moved(source), *rest] for source, *rest in config['head']]
    return {**config, 'backbone': begin + config['backbone'][last_stage + 1 :], 'head': head}


def _channels(backbone: str) -> list[int]:
    try:
        with torch.device('meta'):
            return TimmBackbone(backbone).channels
    except ValueError:
        raise
    except Exception:  # not every model of timm can be built without memory
        return TimmBackbone(backbone).channels

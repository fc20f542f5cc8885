"""What is minimized: timm's tasks, that is a forward pass and its loss, with labels alone or with a teacher."""

import textwrap

import timm
import torch
from timm.loss import create_classification_loss
from timm.loss.class_weights import compute_class_weights
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TrainingTask,
)
from torch import nn

from .config import Config, DistillConfig
from .errors import TrainError


def build_task(
    model: nn.Module,
    config: Config,
    data_config: dict,
    num_classes: int,
    counts: list[int] | None,
    device: torch.device,
) -> TrainingTask:
    """timm's task for a prepared model: called with images and targets it returns {'loss': ..., 'output': ...}.

    Args:
        model: as prepared.
        config: the run's configuration.
        data_config: timm's description of the network's input.
        num_classes: outputs of the classifier.
        counts: training images per class, where loss.class_weight needs them.
        device: of the loss and the teacher.

    Raises:
        TrainError: if the loss does not go with the other settings, or the teacher cannot be made.
    """
    criterion = build_criterion(config, num_classes, counts)
    if config.distill.teacher is None:
        kind = MultiLabelClassificationTask if config.data.multi_label else ClassificationTask
        return kind(model, criterion=criterion, device=device, verbose=False)
    task = LogitDistillationTask(
        model,
        build_teacher(config.distill, num_classes, config.model.in_chans, device),
        criterion=criterion,
        task_loss_weight=1 - config.distill.weight,
        distill_loss_weight=config.distill.weight,
        temperature=config.distill.temperature,
        device=device,
        verbose=False,
    )
    for name in ('mean', 'std'):  # what the images were normalized by, which need not be the model's own
        task.get_buffer(f'student_{name}').copy_(torch.tensor(data_config[name]).view(1, -1, 1, 1))
    return task


def build_criterion(config: Config, num_classes: int, counts: list[int] | None) -> nn.Module:
    """The loss between logits and class indices, soft targets of mixup, or several binary labels."""
    loss, augment, multi_label = config.loss, config.augment, config.data.multi_label
    mixed = bool(augment.mixup or augment.cutmix)
    kind, weights = 'class_weight', loss.class_weights
    if weights is not None and len(weights) != num_classes:
        raise TrainError(f'loss.class_weights should have {num_classes} values, one per class, got {len(weights)}')
    try:
        if loss.class_weight is not None:
            kind, weights = compute_class_weights(counts, sum(counts), loss.class_weight)
        if loss.name in (None, 'ce') and not multi_label:
            weight = None if weights is None else torch.as_tensor(weights, dtype=torch.float32)
            if kind != 'class_weight':
                raise ValueError('neg_pos weighs positives, which cross-entropy has none of')
            return nn.CrossEntropyLoss(weight, label_smoothing=0.0 if mixed else augment.label_smoothing, **loss.kwargs)
        return create_classification_loss(
            loss.name,
            multi_label=multi_label,
            smoothing=augment.label_smoothing,
            soft_targets=mixed,
            jsd_splits=augment.splits,
            **({} if weights is None else {kind: weights}),
            **loss.kwargs,
        )
    except (ValueError, TypeError) as error:
        raise TrainError(f'loss: {error}', usage=True) from None


def build_teacher(distill: DistillConfig, num_classes: int, in_chans: int, device: torch.device) -> DistillationTeacher:
    """The teacher with its weights, frozen; it has to know the same classes."""
    kwargs = {}
    if distill.checkpoint:
        overlay = {'file': distill.checkpoint, 'num_classes': num_classes}
        kwargs = {'num_classes': num_classes, 'pretrained_cfg_overlay': overlay}
    try:
        teacher = timm.create_model(distill.teacher, pretrained=True, in_chans=in_chans, **kwargs)
    except Exception as error:  # a constructor, a download or a file of others: each fails in its own way
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=' ...')
        raise TrainError(f'distill.teacher {distill.teacher!r} cannot be created: {reason}') from error
    if teacher.num_classes != num_classes:
        raise TrainError(
            f'distill.teacher {distill.teacher!r} knows {teacher.num_classes} classes, the data set has {num_classes}'
        )
    return DistillationTeacher(teacher.requires_grad_(False).to(device), device=device)

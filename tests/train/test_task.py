"""Losses, class weights and teachers."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from dcnzoo.train.config import AugmentConfig, Config, DataConfig, LossConfig
from dcnzoo.train.data import class_counts, open_splits
from dcnzoo.train.errors import TrainError
from dcnzoo.train.task import build_criterion, build_task

from .conftest import settings

MEAN = {'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25)}


def criterion(counts=None, mixup=0.0, multi_label=False, splits=0, smoothing=0.0, **loss):
    config = Config(
        loss=LossConfig(**loss),
        augment=AugmentConfig(mixup=mixup, label_smoothing=smoothing, splits=splits),
        data=DataConfig(multi_label=multi_label),
    )
    return build_criterion(config, 3, counts)


def test_losses():
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 2, 2])
    weighted = criterion(class_weights=[1.0, 2.0, 0.0])(logits, targets)
    each = nn.functional.cross_entropy(logits, targets, reduction='none')
    torch.testing.assert_close(weighted, (each[0] + 2 * each[1]) / 3)
    by_frequency = criterion([1, 1, 4], class_weight='inv_freq')
    torch.testing.assert_close(by_frequency.weight / by_frequency.weight[2], torch.tensor([4.0, 4.0, 1.0]))
    soft = torch.eye(3)[targets]
    torch.testing.assert_close(criterion(mixup=0.5)(logits, soft), each.mean())
    labels = torch.tensor([[1.0, 0, 1]]).expand(6, 3)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(criterion(multi_label=True)(logits, labels), expected)
    assert type(criterion(name='asl', multi_label=True)).__name__ == 'AsymmetricLossMultiLabel'
    assert type(criterion(name='jsd', splits=3)).__name__ == 'JsdCrossEntropy'
    assert criterion(name='bce', kwargs={'bce_target_thresh': 0.2}).target_threshold == 0.2


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'class_weights': [1.0]}, r'loss\.class_weights should have 3 values, one per class, got 1'),
        ({'name': 'zlpr'}, r"loss: Loss type 'zlpr' requires multi-label targets"),
        ({'kwargs': {'bce_sun': True}, 'name': 'bce'}, r'loss: .*bce_sun'),
        ({'class_weight': 'neg_pos', 'counts': [1, 2, 3]}, r'loss: neg_pos weighs positives'),
    ],
)
def test_wrong_losses(changes, message):
    with pytest.raises(TrainError, match=message):
        criterion(**changes)


def test_classes_are_counted(photos):
    assert class_counts(open_splits(DataConfig(root=str(photos))).train, 3) == [12, 12, 12]


def test_a_teacher(trained):
    """The loss is timm's mean of labels and answers, and the teacher sees the images as it was trained to."""
    model = timm.create_model('test_dcnv4', num_classes=3)
    config = Config()
    config.distill.teacher, config.distill.weight, config.distill.temperature = (
        f'local-dir:{trained / "best"}',
        0.25,
        2.0,
    )
    config.augment.label_smoothing = 0.0
    task = build_task(model, config, MEAN, 3, None, torch.device('cpu')).train()
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    assert not task.teacher.model.training
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    model.eval()
    teacher = timm.create_model(config.distill.teacher, pretrained=True).eval()
    cfg = teacher.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(1, -1, 1, 1) for name in ('mean', 'std'))
    seen = (images * 0.25 + 0.5 - mean) / std
    with torch.no_grad():
        logits = model(images)
        answers = nn.functional.log_softmax(teacher(seen) / 2, -1)
        distance = nn.functional.kl_div(
            nn.functional.log_softmax(logits / 2, -1), answers, reduction='batchmean', log_target=True
        )
        expected = 0.75 * nn.functional.cross_entropy(logits, targets) + 0.25 * 4 * distance
        torch.testing.assert_close(task(images, targets)['loss'], expected, rtol=1e-4, atol=1e-5)


def test_training_with_a_teacher_and_with_splits(photos, trained, tmp_path, train):
    arguments = settings(photos, tmp_path / 'run', schedule__epochs=1, distill__teacher=f'local-dir:{trained / "best"}')
    assert train(arguments)[0] == 0
    weights = load_file(tmp_path / 'run' / 'last' / 'model.safetensors')
    assert not any(key.startswith('teacher') for key in weights)
    arguments = settings(
        photos, tmp_path / 'splits', schedule__epochs=1, augment__splits=3, loss__name='jsd',
        augment__auto_augment='augmix-m3-w3', augment__random_erasing=0.5, model__num_classes=4,
    )  # fmt: skip
    status, text, errors = train(arguments)
    assert (status, errors) == (0, []), text


def test_a_teacher_of_other_classes(photos, tmp_path, train, trained):
    arguments = settings(
        photos, tmp_path / 'run', model__num_classes=5, distill__teacher=f'local-dir:{trained / "best"}'
    )
    status, _, errors = train(arguments)
    assert status == 1
    assert errors == [f"error: distill.teacher 'local-dir:{trained / 'best'}' knows 3 classes, the data set has 5"]

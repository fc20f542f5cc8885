"""Validation: timm's evaluators over a loader, and with --eval also per class."""

import csv
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import atomic, write_json
from .config import Config
from .errors import TrainError

if TYPE_CHECKING:
    from .loop import Trainer

MOST_CLASSES = 1000  # of which pairs are counted and drawn


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    transform,
    evaluator: ClassificationEvaluator,
) -> None:
    """Feeds an evaluator with the answers to the readable images among those that this process has."""
    model.eval()
    for images, targets in batches:
        images, targets = images.to(accelerator.device), targets.to(accelerator.device)
        readable = (targets if targets.ndim == 1 else targets[:, 0]) >= 0
        images, targets = transform(images[readable], targets[readable])
        with accelerator.autocast():
            logits = model(images)
        evaluator.update(logits.float(), targets)


def metrics_of(evaluator: ClassificationEvaluator, accelerator: Accelerator) -> dict[str, float]:
    """Metrics over the shares of all processes, counted exactly, as val_loss, val_top1 ...

    Raises:
        TrainError: if no image could be read.
    """
    several = accelerator.num_processes > 1
    if accelerator.reduce(evaluator.counts, 'sum')[0] == 0:
        raise TrainError('no validation image could be read')
    return {f'val_{name}': float(value) for name, value in evaluator.compute(distributed=several).items()}


def build_evaluator(multi_label: bool, device: torch.device) -> ClassificationEvaluator:
    """Top-1, top-5 and cross-entropy; for several labels mean average precision, F1 and binary cross-entropy."""
    return MultiLabelClassificationEvaluator(device) if multi_label else ClassificationEvaluator(device)


class PerClass(ClassificationEvaluator):
    """The same with counts per class: images, hits among the first one and five, and what was taken for what."""

    def __init__(self, num_classes: int, device: torch.device):
        self.num_classes = num_classes
        self.answers: list[int] = []
        super().__init__(device)

    def reset(self) -> None:
        super().reset()
        zeros = torch.zeros(self.num_classes, dtype=torch.int64, device=self.device)
        self.per_class = torch.stack([zeros, zeros, zeros])
        self.confusion = None
        if self.num_classes <= MOST_CLASSES:
            self.confusion = torch.zeros(self.num_classes**2, dtype=torch.int64, device=self.device)

    def update(self, output: Tensor, target: Tensor) -> None:
        super().update(output, target)
        hits = output.topk(min(5, output.shape[1])).indices == target[:, None]
        self.answers += output.argmax(1).tolist()
        for counts, hit in zip(self.per_class, (torch.ones_like(target), hits[:, 0], hits.any(1)), strict=True):
            counts.index_add_(0, target, hit.long())
        if self.confusion is not None:
            pairs = target * self.num_classes + output.argmax(1)
            self.confusion += torch.bincount(pairs, minlength=self.num_classes**2)

    def gather(self, accelerator: Accelerator) -> tuple[list[list[int]], Tensor | None]:
        """(images, top-1, top-5) per class, and the confusion matrix, truth by answer, over all processes."""
        per_class = accelerator.reduce(self.per_class, 'sum').t().tolist()
        if self.confusion is None:
            return per_class, None
        return per_class, accelerator.reduce(self.confusion, 'sum').view(self.num_classes, -1).cpu()


def with_weights_of_run(config: Config) -> Config:
    """The configuration with the best weights of the run that --resume names, or as it is if that names none."""
    if config.resume is None:
        return config
    named = Path(config.run.output if config.resume == 'auto' else config.resume)
    folder = next((each for each in (named, named / 'best') if (each / 'config.json').is_file()), None)
    if folder is None:
        raise TrainError(f'--resume: {named} holds no weights in best/')
    model = replace(config.model, name=f'local-dir:{folder}', pretrained=True, checkpoint=None, kwargs={})
    return replace(config, model=model)


def evaluate_only(trainer: 'Trainer') -> dict:
    """Validates a model as it is, and writes eval/ in the run's folder: metrics, per class, what was taken for what."""
    accelerator, data, report = trainer.accelerator, trainer.config.data, trainer.report
    folder, classes = trainer.output / 'eval', trainer.network.config['num_classes']
    model, splits = trainer.network.plain, trainer.data.splits
    started = time.monotonic()
    if data.multi_label:
        metrics = trainer.validate(model)
        if accelerator.is_main_process:
            write_json(folder / 'eval.json', metrics)
    else:
        real = RealLabels(data.real_labels, splits.val.filenames()) if data.real_labels else None
        evaluator = PerClass(classes, accelerator.device)
        metrics = trainer.validate(model, evaluator)
        if real is not None:
            order = [index for batch in trainer.data.val_loader.batch_sampler for index in batch]
            metrics['real_top1'] = real.top1(order, evaluator.answers, accelerator)
        per_class, confusion = evaluator.gather(accelerator)
        names = splits.classes or []
        if accelerator.is_main_process:
            names = names + [str(label) for label in range(len(names), classes)]
            write_evaluation(folder, metrics, names, per_class, confusion)
    rate = len(splits.val) / (time.monotonic() - started)
    values = '  '.join(f'{name.removeprefix("val_")} {value:.4g}' for name, value in metrics.items())
    report.say(f'{values}  ({rate:.0f} img/s)')
    report.say(f'details in {folder}')
    return metrics


class RealLabels:
    """Top-1 on ImageNet's reassessed labels (https://arxiv.org/abs/2006.07159), of which an image may have several.

    Args:
        source: JSON file, a list of labels per validation image in their order, or `imagenet` for that of timm.
        names: the images' file names, as ILSVRC2012_val_00000001.JPEG, in the order of the data set.
    """

    def __init__(self, source: str, names: list[str]):
        from timm.data import RealLabelsImagenet

        try:
            table = RealLabelsImagenet(names, None if source == 'imagenet' else source).real_labels
            self.labels = [table[Path(name).name] for name in names]
        except (OSError, ValueError, KeyError, AssertionError) as error:
            reason = str(error) or f'{len(names)} images are not those of ImageNet'
            raise TrainError(f'data.real_labels {source!r} does not fit the validation images: {reason}') from None

    def top1(self, indices: list[int], answers: list[int], accelerator: Accelerator) -> float:
        """Share in percent of right answers among the images that have labels, over the shares of all processes."""
        if len(indices) != len(answers):
            raise TrainError('data.real_labels needs every validation image to be readable')
        pairs = [(self.labels[index], answer) for index, answer in zip(indices, answers, strict=True)]
        judged = [answer in labels for labels, answer in pairs if labels]
        counts = torch.tensor([len(judged), sum(judged)], device=accelerator.device)
        total, right = accelerator.reduce(counts, 'sum').tolist()
        return 100 * right / max(1, total)


def write_evaluation(
    folder: Path, metrics: dict, names: list[str], per_class: list[list[int]], confusion: Tensor | None
) -> None:
    """Writes eval.json, per_class.csv, and confusion.png where the classes are not too many."""
    write_json(folder / 'eval.json', metrics)
    lines = [('class', 'images', 'top1', 'top5')]
    for name, (images, *hits) in zip(names, per_class, strict=True):
        lines.append((name, images, *(f'{100 * each / images:.2f}' if images else '' for each in hits)))
    with atomic(folder / 'per_class.csv') as draft, draft.open('w', newline='', encoding='utf-8') as file:
        csv.writer(file, lineterminator='\n').writerows(lines)
    if confusion is not None:
        draw_confusion(folder / 'confusion.png', names, confusion, f'top-1 {metrics["val_top1"]:.2f} %')


def draw_confusion(path: Path, names: list[str], confusion: Tensor, title: str) -> None:
    """Draws the confusion matrix, each row as shares of its class; with numbers where they can be read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = F.normalize(confusion.double(), p=1, dim=1)
    side = min(24, max(5, 0.35 * len(names)))
    figure = Figure(figsize=(side + 1, side), layout='constrained')
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares.numpy(), cmap='Blues', vmin=0, vmax=1), label='share of the class')
    axes.set(xlabel='answer', ylabel='truth', title=title)
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in confusion.nonzero().tolist():
            color = 'white' if shares[row, column] > 0.5 else 'black'
            axes.text(column, row, int(confusion[row, column]), ha='center', va='center', color=color)
    with atomic(path) as draft:
        FigureCanvasAgg(figure).print_png(draft)

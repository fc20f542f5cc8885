"""What a run leaves on disk, and how it resumes. Files and folders take their name when they are complete.

runs/NAME/
  run.yaml         the run's configuration, complete
  best/  last/     model.safetensors and config.json, from which timm.create_model('local-dir:runs/NAME/best',
                   pretrained=True) makes the model, and run.yaml; where EMA is on, these are the averaged weights,
                   and a folder raw/ holds those without it in the same form
  checkpoints/     epoch_0003_batch_00000123/: what accelerate needs to continue, the average, and loop.State
  metrics.csv  curves.png  tensorboard/  unreadable.txt  summary.json
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.scheduler.scheduler import Scheduler
from torch import nn

from .config import Config
from .errors import TrainError

FOLDERS = ('best', 'last', 'checkpoints', 'tensorboard')
FILES = ('run.yaml', 'metrics.csv', 'curves.png', 'unreadable.txt', 'summary.json')


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block has ended without an error.

    Raises:
        TrainError: if it cannot be written; then `path` is as it was.
    """
    draft = path.with_name(f'.{path.name}.{os.getpid()}.draft')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        with open(draft, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise TrainError(f'cannot write {path}: {reason}; what was there is untouched', local=True) from error
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, or leaves the old one."""
    with atomic(path) as draft:
        draft.write_text(text, encoding='utf-8')


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file, or leaves the old one."""
    write_text(path, json.dumps(content, indent=2) + '\n')


def save_weights(path: Path, model: nn.Module) -> None:
    """Writes a module's weights as safetensors, or leaves the old file."""
    with atomic(path) as draft:
        weights = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
        save_file(weights, draft, metadata={'format': 'pt'})


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads into a module what `save_weights` wrote."""
    model.load_state_dict(load_file(path))


def check_output(config: Config) -> None:
    """Makes the run's folder and makes sure, before anything is trained, that it can be written and is free.

    Raises:
        TrainError: if it cannot be written, or holds a run that is neither resumed nor to be overwritten.
    """
    output = Path(config.run.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b'writable')
    except OSError as error:
        raise TrainError(f'run.output: cannot write to {output}: {error.strerror}') from None
    taken = next((name for name in (*FOLDERS, *FILES) if (output / name).exists()), None)
    if taken and config.resume is None and not config.run.overwrite:
        raise TrainError(
            f'run.output: {output} holds a run already ({taken}); continue it with --resume auto, replace it with '
            f'--run.overwrite true, or name another folder with --run.output'
        )


def begin_output(config: Config) -> None:
    """Removes what an earlier run left in the folder, unless that one is resumed, and writes the configuration."""
    output = Path(config.run.output)
    if config.resume is None:
        for name in FOLDERS:
            shutil.rmtree(output / name, ignore_errors=True)
        for name in FILES:
            (output / name).unlink(missing_ok=True)
    write_text(output / 'run.yaml', config.to_yaml())


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that the run starts from: what --resume names, or the newest in the folder it names.

    Returns:
        The folder of the checkpoint, or None if there is nothing to resume (only `auto` allows that).

    Raises:
        TrainError: if --resume names something that holds no checkpoint.
    """
    if config.resume is None:
        return None
    named = Path(config.run.output) if config.resume == 'auto' else Path(config.resume)
    for folder in (named, named.parent):  # a run's best/ or last/ stands for the run
        checkpoints = list_checkpoints(folder)
        if checkpoints:
            return checkpoints[-1]
    if (named / 'trainer.json').is_file():
        return named
    if config.resume == 'auto':
        return None
    raise TrainError(f'--resume: {named} ' + ('holds no resumable checkpoint' if named.exists() else 'does not exist'))


def list_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, oldest first."""
    folders = (output / 'checkpoints').glob('epoch_*')
    return sorted(path for path in folders if re.fullmatch(r'epoch_\d+_batch_\d+', path.name))


class Checkpoints:
    """Saves and restores one run.

    Args:
        accelerator: with everything prepared.
        output: the run's folder.
        config: the run's configuration.
        model_config: content of config.json, in timm's form.
        ema: the averaged model, or None.
    """

    def __init__(
        self, accelerator: Accelerator, output: Path, config: Config, model_config: dict, ema: nn.Module | None
    ):
        self.accelerator = accelerator
        self.output = output
        self.config = config
        self.model_config = model_config
        self.ema = ema
        # what two runs have to share for one to continue the other
        self.identity = {
            **{key: model_config.get(key) for key in ('architecture', 'num_classes', 'model_args', 'label_names')},
            'in_chans': config.model.in_chans,
            'ema': ema is not None,
        }

    def publish(self, name: str, model: nn.Module) -> None:
        """Writes best/ or last/: weights, config.json and run.yaml. On the main process only."""
        folder = self.output / name
        # one file of weights per folder: older versions of timm do not choose between several
        places = {folder: model} if self.ema is None else {folder: self.ema, folder / 'raw': model}
        for place, weights in places.items():
            save_weights(place / 'model.safetensors', weights)
            write_json(place / 'config.json', self.model_config)
        write_text(folder / 'run.yaml', self.config.to_yaml())

    def save(self, state: dict) -> Path:
        """Writes a resumable checkpoint and removes those that are too old; called by every process.

        Args:
            state: JSON content that `load` gives back; its epoch and batch name the checkpoint.

        Raises:
            TrainError: if it cannot be written; the checkpoints before it are untouched.
        """
        target = self.output / 'checkpoints' / f'epoch_{state["epoch"]:04d}_batch_{state["batch"]:08d}'
        if target.exists():
            return target
        draft = target.with_name(f'.{target.name}.draft')
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(draft))
            if self.accelerator.is_main_process:
                if self.ema is not None:
                    save_weights(draft / 'ema.safetensors', self.ema)
                write_json(draft / 'trainer.json', {'identity': self.identity, 'state': state})
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                os.replace(draft, target)
                for old in list_checkpoints(self.output)[: -self.config.run.keep]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError, TrainError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            kept = list_checkpoints(self.output)
            advice = f'continue from {kept[-1]} with --resume auto' if kept else 'there is no checkpoint before it'
            raise TrainError(f'cannot write the checkpoint {target}: {error}; {advice}', local=True) from error
        self.accelerator.wait_for_everyone()
        return target

    def load(self, folder: Path) -> dict:
        """Restores what `save` wrote and returns its `state`; called by every process.

        Raises:
            TrainError: if the checkpoint is damaged, or one of another model.
        """
        try:
            content = json.loads((folder / 'trainer.json').read_text(encoding='utf-8'))
            theirs, state = content['identity'], content['state']
        except (OSError, ValueError, KeyError) as error:
            raise TrainError(f'--resume: {folder} is no complete checkpoint: {error}') from None
        for key, ours in self.identity.items():
            if theirs.get(key) != ours:
                difference = f'{key} is {str(theirs.get(key))[:100]}, not {str(ours)[:100]}'
                raise TrainError(f'--resume: {folder} is a checkpoint of another model: {difference}')
        try:
            self.accelerator.load_state(str(folder))
            if self.ema is not None:
                load_weights(folder / 'ema.safetensors', self.ema)
        except Exception as error:  # a damaged file, or one that would run code, is refused in any way
            raise TrainError(f'--resume: {folder} is damaged or of another model: {str(error)[:300]}') from error
        if self.accelerator.is_main_process and folder.parent == self.output / 'checkpoints':
            for later in (path for path in list_checkpoints(self.output) if path.name > folder.name):
                shutil.rmtree(later)  # the run branches off here
        return state


def keep_schedule(accelerator: Accelerator, scheduler: Scheduler) -> None:
    """Saves and loads a schedule's memory with accelerate's checkpoints, as JSON.

    accelerate's own way for such objects is a pickle, which could run any code when it is loaded.
    """

    def save(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            write_json(Path(folder) / 'schedule.json', scheduler.state_dict())

    def load(models: list, folder: str) -> None:
        scheduler.load_state_dict(json.loads((Path(folder) / 'schedule.json').read_text(encoding='utf-8')))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def timm_config(model: nn.Module, data_config: dict, classes: list[str] | None, kwargs: dict) -> dict:
    """config.json as `timm.create_model('local-dir:...')` and hf-hub read it.

    Args:
        model: network made by timm.
        data_config: timm's description of its input.
        classes: names of the classes in order, if known.
        kwargs: arguments the network was made with, beyond num_classes and in_chans.
    """
    kept = ('fixed_input_size', 'first_conv', 'classifier', 'license')
    pretrained_cfg = {key: model.pretrained_cfg[key] for key in kept if model.pretrained_cfg.get(key) is not None}
    pretrained_cfg |= {key: list(value) if isinstance(value, tuple) else value for key, value in data_config.items()}
    pretrained_cfg['num_classes'] = model.num_classes
    content = {
        'architecture': model.pretrained_cfg['architecture'],
        'num_classes': model.num_classes,
        'num_features': model.num_features,
        'pretrained_cfg': pretrained_cfg,
    }
    if classes and len(classes) == model.num_classes:
        content['label_names'] = classes
    inherited = getattr(model, 'pretrained_model_args', None) or {}  # of a model that came from such a folder itself
    model_args = inherited | kwargs
    for key in ('num_classes', 'in_chans'):  # both follow from pretrained_cfg
        model_args.pop(key, None)
    if model.in_chans != 3:
        model_args['in_chans'] = model.in_chans  # transformers learns it from here alone
    if model_args:
        content['model_args'] = json.loads(json.dumps(model_args))
    return content

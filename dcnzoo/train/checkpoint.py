"""What a run leaves on disk, and how it resumes. Files and folders take their name when they are complete.

runs/NAME/
  run.yaml         the run's configuration, complete
  best/  last/     model.safetensors and config.json, from which timm.create_model('local-dir:runs/NAME/best',
                   pretrained=True) makes the model, and run.yaml; where EMA is on, these are the averaged weights,
                   and a folder raw/ holds those without it in the same form
  checkpoints/     epoch_0003_batch_00000123/: what accelerate needs to continue, the average, the run's State in
                   trainer.json, and manifest.json with the size and SHA-256 of each of these files
  metrics.csv      one row per epoch; health.csv: measurements of the deformable layers; tensorboard/
  unreadable.txt   images that were skipped; nonfinite.txt: batches that were
  report.html  curves.png  summary.json
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.scheduler import PlateauLRScheduler
from torch import Tensor, nn

from .config import Config
from .errors import TrainError

FOLDERS = ('best', 'last', 'checkpoints', 'tensorboard', 'wandb')
FILES = (
    'run.yaml',
    'metrics.csv',
    'health.csv',
    'unreadable.txt',
    'nonfinite.txt',
    'curves.png',
    'report.html',
    'summary.json',
)
MANIFEST = 'manifest.json'
PLATEAU_MEMORY = ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch')


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
        _to_disk(draft)
        os.replace(draft, path)
        _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise TrainError(f'cannot write {path}: {reason}; what was there is untouched', local=True) from error
    finally:
        draft.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, would survive a loss of power."""
    if os.name == 'nt' and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, or leaves the old one."""
    with atomic(path) as draft:
        draft.write_text(text, encoding='utf-8')


def append_text(path: Path, text: str) -> None:
    """Adds lines to a text file."""
    try:
        with path.open('a', encoding='utf-8') as file:
            file.write(text)
    except OSError as error:
        raise TrainError(f'cannot write {path}: {error.strerror}', local=True) from error


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file, or leaves the old one."""
    write_text(path, json.dumps(content, indent=2) + '\n')


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes a module's state_dict as safetensors, or leaves the old file."""
    with atomic(path) as draft:
        save_file({key: value.contiguous().cpu() for key, value in weights.items()}, draft, metadata={'format': 'pt'})


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
    if taken and not _continues(config) and not config.run.overwrite:
        raise TrainError(
            f'run.output: {output} holds a run already ({taken}); continue it with --resume auto, replace it with '
            f'--run.overwrite true, or name another folder with --run.output'
        )


def begin_output(config: Config) -> None:
    """Removes what an earlier run left in the folder, unless that one is resumed, and writes the configuration."""
    output = Path(config.run.output)
    if not _continues(config):
        for name in FOLDERS:
            shutil.rmtree(output / name, ignore_errors=True)
        for name in FILES:
            (output / name).unlink(missing_ok=True)
    for draft in output.rglob('.*.draft'):  # of a run that was killed while it wrote
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
    write_text(output / 'run.yaml', config.to_yaml())


def _continues(config: Config) -> bool:
    """Whether the run goes on where it is, and not in another folder."""
    if config.resume in (None, 'auto'):
        return config.resume == 'auto'
    return Path(config.resume).resolve().is_relative_to(Path(config.run.output).resolve())


def find_checkpoints(config: Config) -> list[Path]:
    """The checkpoints that the run may start from: what --resume names, or all in the folder it names.

    Returns:
        Folders, newest first; none if there is nothing to resume (only `auto` allows that).

    Raises:
        TrainError: if --resume names something that holds no checkpoint.
    """
    if config.resume is None:
        return []
    output = Path(config.run.output)
    named = output if config.resume == 'auto' else Path(config.resume)
    if _continues(config):  # spelled as the run's other checkpoints are, with which it is compared
        named = output / named.resolve().relative_to(output.resolve())
    for folder in (named, named.parent):  # a run's best/ or last/ stands for the run
        if checkpoints := list_checkpoints(folder):
            return checkpoints[::-1]
    if (named / 'trainer.json').is_file():
        return [named]
    if config.resume == 'auto':
        return []
    raise TrainError(f'--resume: {named} ' + ('holds no resumable checkpoint' if named.exists() else 'does not exist'))


def choose_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """The newest undamaged one of `find_checkpoints`, and a complaint about each newer one.

    Raises:
        TrainError: if all of them are damaged, or --resume names nothing that can be resumed.
    """
    complaints = []
    for folder in find_checkpoints(config):
        damage = find_damage(folder)
        if damage is None:
            return folder, complaints
        complaints.append(f'the checkpoint {folder} is damaged: {damage}')
    if complaints:
        raise TrainError(f'--resume: {"; ".join(complaints)}; there is none before')
    return None, []


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, if anything is: their sizes and sums are in its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding='utf-8'))
        for name, (size, digest) in manifest.items():
            if (folder / name).stat().st_size != size:
                return f'{name} should have {size} bytes, but has {(folder / name).stat().st_size}'
            if _sha256(folder / name) != digest:
                return f'{name} does not match its SHA-256'
    except FileNotFoundError as error:
        return f'{Path(error.filename).name} is missing'
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f'{MANIFEST} cannot be read: {error}'
    return None if 'trainer.json' in manifest else f'{MANIFEST} is incomplete'


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
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
        """Writes best/ or last/: weights, config.json and run.yaml. Called by every process, as weights may be shared.

        Args:
            name: of the folder.
            model: as prepared; where there is an average, that is the model, and this one goes to raw/.
        """
        raw = self.accelerator.get_state_dict(model)
        if not self.accelerator.is_main_process:
            return
        folder = self.output / name
        # one file of weights per folder: older versions of timm do not choose between several
        places = {folder: raw} if self.ema is None else {folder: self.ema.state_dict(), folder / 'raw': raw}
        for place, weights in places.items():
            save_weights(place / 'model.safetensors', weights)
            write_json(place / 'config.json', self.model_config)
        write_text(folder / 'run.yaml', self.config.to_yaml())

    def save(self, state: dict, proven: Path | None = None) -> Path:
        """Writes a resumable checkpoint and removes those that are too old; called by every process.

        Args:
            state: JSON content that `load` gives back; its epoch and batch name the checkpoint.
            proven: a checkpoint to keep, however old.

        Raises:
            TrainError: on every process, if one of them cannot write; the checkpoints before are untouched.
        """
        target = self.output / 'checkpoints' / f'epoch_{state["epoch"]:04d}_batch_{state["batch"]:08d}'
        if target.exists():
            return target
        draft = target.with_name(f'.{target.name}.draft')
        main = self.accelerator.is_main_process
        self._agree(target, lambda: main and self._begin(draft))
        self._agree(target, lambda: self._write(draft, state))
        self._agree(target, lambda: main and self._finish(draft, target, proven))
        return target

    def _agree(self, target: Path, write: Callable[[], object]) -> None:
        """Does one part of the writing and waits for the others' parts; if one fails, all raise."""
        failure = None
        try:
            write()
        except (OSError, RuntimeError, SafetensorError, TrainError) as error:
            failure = ' '.join(str(error).split())
        failures = [each for each in gather_object([failure]) if each]
        if failures:
            if self.accelerator.is_main_process:
                shutil.rmtree(target.with_name(f'.{target.name}.draft'), ignore_errors=True)
            kept = list_checkpoints(self.output)
            advice = f'continue from {kept[-1]} with --resume auto' if kept else 'there is no checkpoint before it'
            raise TrainError(f'cannot write the checkpoint {target}: {failures[0]}; {advice}')

    def _begin(self, draft: Path) -> None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)

    def _write(self, draft: Path, state: dict) -> None:
        self.accelerator.save_state(str(draft))
        if self.accelerator.is_main_process:
            if self.ema is not None:
                save_weights(draft / 'ema.safetensors', self.ema.state_dict())
            write_json(draft / 'trainer.json', {'identity': self.identity, 'state': state})

    def _finish(self, draft: Path, target: Path, proven: Path | None) -> None:
        """Only now that all is on the disk does the checkpoint get its name, and only then do older ones go."""
        files = sorted(path for path in draft.rglob('*') if path.is_file())
        for path in files:
            _to_disk(path)
        sums = {path.relative_to(draft).as_posix(): (path.stat().st_size, _sha256(path)) for path in files}
        write_json(draft / MANIFEST, sums)
        os.replace(draft, target)
        _to_disk(target.parent)
        for old in list_checkpoints(self.output)[: -self.config.run.keep]:
            if old != proven:
                shutil.rmtree(old)

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
        self.accelerator.wait_for_everyone()
        return state


def keep_schedule(accelerator: Accelerator, scheduler: PlateauLRScheduler) -> None:
    """Saves and loads a schedule's memory with accelerate's checkpoints, as JSON.

    accelerate's own way for such objects is a pickle, which could run any code when it is loaded; timm's own state
    leaves out how many epochs were no better.
    """

    def save(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            memory = {name: getattr(scheduler.lr_scheduler, name) for name in PLATEAU_MEMORY}
            write_json(Path(folder) / 'schedule.json', {**memory, 'restore_lr': scheduler.restore_lr})

    def load(models: list, folder: str) -> None:
        memory = json.loads((Path(folder) / 'schedule.json').read_text(encoding='utf-8'))
        scheduler.restore_lr = memory.pop('restore_lr')
        scheduler.lr_scheduler.load_state_dict(memory)

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

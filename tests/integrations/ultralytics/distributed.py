"""A trainer of two processes on the CPU, where ultralytics itself starts none."""

from torch import distributed, nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOCAL_RANK, RANK


class TwoOnCPU(DetectionTrainer):
    """Starts two processes as ultralytics does one per GPU; each leaves a checksum of its weights."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.world_size = 2
        self.ddp = LOCAL_RANK == -1

    def _setup_ddp(self):
        distributed.init_process_group('gloo', rank=RANK, world_size=self.world_size)
        nn.parallel.DistributedDataParallel = _WithoutDevices

    def _do_train(self):
        super()._do_train()
        checksum = sum(parameter.detach().double().abs().sum().item() for parameter in self.model.parameters())
        (self.save_dir / f'rank{RANK}').write_text(repr(checksum))

    def final_eval(self):
        """Left out: of several processes it expects that each has a GPU."""


class _WithoutDevices(nn.parallel.DistributedDataParallel):
    """Takes the place of a GPU's number, which ultralytics always passes."""

    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)

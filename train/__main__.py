"""Trains from a clone, installed or not: all of these do the same.

accelerate launch train --config configs/digits_atto.yaml --data.root DIR
accelerate launch -m train --config digits_atto --data.root DIR
python -m train --config digits_atto --data.root DIR --optim.lr 1e-3
torchrun --nproc_per_node 2 -m train --config digits_atto --data.root DIR
"""

import os
import sys
from pathlib import Path

# OpenMP's threads spin while they wait. Where the loaders' processes or others need the cores, that costs a training on
# CPU most of its time. Read when torch is loaded.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

# Run as a folder, the first entry of the path is this folder, not the clone. The clone comes last: where the package is
# installed, that one has the compiled operators.
clone = Path(__file__).resolve().parents[1]
sys.path = [entry for entry in sys.path if Path(entry or '.').resolve() not in (clone, clone / 'train')] + [str(clone)]

from dcnzoo.train.main import main  # noqa: E402

if __name__ == '__main__':
    sys.exit(main())

"""Trains from a clone, installed or not: all of these do the same.

accelerate launch train --config configs/digits_atto.yaml --data.root DIR
accelerate launch -m train --config digits_atto --data.root DIR
python -m train --config digits_atto --data.root DIR --optim.lr 1e-3
torchrun --nproc_per_node 2 -m train --config digits_atto --data.root DIR
"""

import os
import sys
from pathlib import Path

# The threads of OpenMP (libgomp, which torch brings) spin for milliseconds when they wait. Where the loaders' processes
# or others need the cores, a training on CPU loses most of its time to that; sleeping at once costs a third on idle
# cores. Some microseconds of spinning are fast on both. Read when torch is loaded.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '20000')

# Run as a folder, the first entry of the path is this folder, not the clone. The clone comes last: where the package is
# installed, that one has the compiled operators.
clone = Path(__file__).resolve().parents[1]
sys.path = [entry for entry in sys.path if Path(entry or '.').resolve() not in (clone, clone / 'train')] + [str(clone)]

try:
    from dcnzoo.train.main import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == '__main__':
    sys.exit(main())

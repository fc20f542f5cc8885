"""`accelerate launch -m dcnzoo.train --config X.yaml` and `python -m dcnzoo.train --config X.yaml`."""

import sys

from dcnzoo.train.main import main

if __name__ == '__main__':
    sys.exit(main())

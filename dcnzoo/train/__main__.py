"""`accelerate launch -m dcnzoo.train --config X.yaml` and `python -m dcnzoo.train --config X.yaml`."""

import sys

try:
    from dcnzoo.train.main import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == '__main__':
    sys.exit(main())

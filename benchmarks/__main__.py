"""Measures dcnzoo beside its peers in one run, prints the table and keeps the numbers as JSON with a chart.

    python -m benchmarks op                                the operator, one thread, batch 1
    python -m benchmarks op --threads 1 2 --batch 8        how it scales
    python -m benchmarks op --device cuda                  its CUDA kernels
    python -m benchmarks model --peers convnext_tiny       images a second of whole models
    python -m benchmarks train --compile                   training steps, eager and compiled
    python -m benchmarks dcnv3                             DCNv3 beside the published composition on a CPU
    python -m benchmarks deform_attn                       deformable attention beside that of transformers
    python -m benchmarks dynamic_conv --batch 8            DynamicConv2d beside timm's CondConv2d
    python -m benchmarks yolo --imgsz 320                  YOLO models with our blocks beside the stock ones
    python -m benchmarks experts --data FLOWERS            ParameterNet trained with 1 and with 4 experts
    python -m benchmarks accuracy --data FLOWERS           dcnv4_atto and networks of its size, trained

`--peers` takes names of the table's rows for `op`, and any of timm's model names for `model`, `train` and `accuracy`.
"""

import argparse
import sys
from pathlib import Path

import torch

from . import accuracy, dcnv3, deform_attn, dynamic_conv, experts, model, op, report, yolo


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = ['op', 'model', 'train', 'dcnv3', 'deform_attn', 'dynamic_conv', 'yolo', 'experts', 'accuracy']
    parser.add_argument('table', choices=tables)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--peers', nargs='+', metavar='NAME', help='what to measure beside dcnzoo')
    parser.add_argument(
        '--threads', nargs='+', type=int, metavar='N', help='CPU threads (op, dcnv3, deform_attn, yolo: 1, else all)'
    )
    parser.add_argument(
        '--batch',
        type=int,
        metavar='N',
        help='images (op: 1, cuda: 64; dcnv3, deform_attn: 1; yolo: 4; else 8, cuda: 64)',
    )
    parser.add_argument('--model', default='dcnv4_tiny', metavar='NAME', help='our model (model and train)')
    parser.add_argument('--dtypes', nargs='+', default=['float32'], choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--compile', action='store_true', help='measure compiled models too')
    parser.add_argument('--rounds', type=int, default=7, metavar='N', help='turns of each peer (default 7)')
    parser.add_argument('--seconds', type=float, default=0.2, metavar='S', help='length of a turn (default 0.2)')
    parser.add_argument('--layouts', nargs='+', default=list(dynamic_conv.LAYOUTS), choices=dynamic_conv.LAYOUTS)
    parser.add_argument('--imgsz', type=int, default=640, metavar='N', help='side of the images (yolo: 640)')
    training = parser.add_argument_group('experts and accuracy')
    training.add_argument('--data', metavar='DIR', help='image folder with train/ and val/')
    training.add_argument('--experts', nargs='+', type=int, default=[1, 4], metavar='N')
    training.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='N')
    training.add_argument('--epochs', type=int, metavar='N', help="the configuration's if not given")
    training.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at a time (default 1)')
    training.add_argument('--runs', type=Path, default=Path('runs/benchmark'), metavar='DIR', help='folder of the runs')
    parser.add_argument('--output', type=Path, default=report.RESULTS, metavar='DIR')
    parser.add_argument('--name', help="the result files' name without suffix")
    options = parser.parse_args()
    for name in ('batch', 'rounds'):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f'--{name} must be at least 1, got {number}')
    if options.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: this machine has no GPU that torch can use')
    if options.table in ('experts', 'accuracy') and not options.data:
        parser.error(f'{options.table} needs --data DIR')
    if options.table == 'op' and options.device == 'cpu' and (unknown := set(options.peers or ()) - set(op.NAMES)):
        parser.error(f'--peers: no such peer as {", ".join(sorted(unknown))}; there are {", ".join(op.NAMES)}')
    return options


def main() -> int:
    options = parse()
    if options.table == 'op' and options.device == 'cuda':
        from . import op_cuda

        options.batch = options.batch or 64
        op_cuda.run(options)
    elif options.table == 'op':
        options.batch, options.threads = options.batch or 1, options.threads or [1]
        op.run(options)
    elif options.table == 'dcnv3':
        options.batch, options.threads = options.batch or 1, options.threads or [1]
        dcnv3.run(options)
    elif options.table == 'deform_attn':
        options.batch, options.threads = options.batch or 1, options.threads or [1]
        deform_attn.run(options)
    elif options.table == 'yolo':
        options.batch, options.threads = options.batch or 4, options.threads or [1]
        yolo.run(options)
    elif options.table == 'dynamic_conv':
        dynamic_conv.run(options)
    elif options.table == 'experts':
        experts.run(options)
    elif options.table == 'accuracy':
        accuracy.run(options)
    else:
        options.batch = options.batch or (64 if options.device == 'cuda' else 8)
        options.threads = options.threads or [torch.get_num_threads()]
        model.run(options, training=options.table == 'train')
    return 0


if __name__ == '__main__':
    sys.exit(main())

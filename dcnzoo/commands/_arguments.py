"""Arguments that several commands have."""

import argparse


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what a model card is told."""
    parser.add_argument('--license', metavar='ID', help='of the weights, for the model card: mit, apache-2.0 ...')
    parser.add_argument(
        '--metric',
        action='append',
        type=_metric,
        default=[],
        metavar='NAME=VALUE',
        help='a figure for the model card, which calls it yours; may be given several times',
    )


def positive(text: str) -> int:
    """The type of a number that is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {number}')
    return number


def _metric(text: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition('='))
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f'must be NAME=VALUE, got {text!r}')
    return name, value

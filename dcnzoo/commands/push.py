"""Pushes a model's folder to the Hugging Face Hub: config.json, model.safetensors and the model card, nothing else.
HF_TOKEN, or `hf auth login`, has the token."""

import argparse
from pathlib import Path

from ..card import card_in_repository, model_card
from ..folder import check, is_backbone, prune, read_config
from ..hub import push
from ._arguments import add_card_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', metavar='DIR', help='what training (runs/X/best) or dcnzoo convert left')
    parser.add_argument('--repo', required=True, metavar='ORG/NAME', help='the repository, made where there is none')
    parser.add_argument('--private', action='store_true', help='make it private; one that is public is refused')
    parser.add_argument('--message', metavar='TEXT', help='of the commit')
    add_card_arguments(parser)


def run(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    repo_id = args.repo.removeprefix('hf-hub:')
    model = check(folder)
    backbone = is_backbone(read_config(folder))
    card = model_card(
        repo_id.rpartition('/')[2],
        prune(model) if backbone else model,
        backbone=backbone,
        license=args.license or model.pretrained_cfg.get('license'),
        made='trained by `dcnzoo.train`' if (folder / 'run.yaml').is_file() else None,
        metrics=dict(args.metric),
    )
    url = push(folder, repo_id, private=args.private, card=card_in_repository(card, repo_id), message=args.message)
    print(f'pushed to {url}; timm loads it as hf-hub:{repo_id}')
    return 0

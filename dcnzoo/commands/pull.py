"""Fetches a model from the Hugging Face Hub and verifies it: into a folder of its own, or into the cache, from which it
loads without a network thereafter."""

import argparse

import timm

from ..hub import fetch_pretrained, pull, sha256
from ._errors import CommandError
from ._models import check_registered, has_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', metavar='ORG/NAME|MODEL', help='a repository, or a model with published weights')
    parser.add_argument('--output', metavar='DIR', help='a new folder, for a repository; by default the cache')
    parser.add_argument('--revision', metavar='NAME', help='branch, tag or commit of a repository; by default main')


def run(args: argparse.Namespace) -> int:
    name = args.model.removeprefix('hf-hub:')
    if '/' not in name:
        return _pull_published(args, name)
    repo_id, _, revision = name.partition('@')
    folder = pull(repo_id, args.output, args.revision or revision or None)
    loaded = f'local-dir:{folder}' if args.output else f'hf-hub:{name}'
    print(f'{folder}\ntimm loads it as {loaded}')
    return 0


def _pull_published(args: argparse.Namespace, name: str) -> int:
    check_registered(name)
    if not has_weights(name):
        raise CommandError(f'there are no published weights for {name}; a repository is named ORG/NAME')
    if args.output or args.revision:
        raise CommandError('published weights go into the cache; dcnzoo convert makes a folder of them')
    path = fetch_pretrained(timm.get_pretrained_cfg(name))
    print(f'{path}\nsha256 {sha256(path)}\ntimm loads it as {name}, pretrained=True')
    return 0

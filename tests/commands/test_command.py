"""What all subcommands share, and the command as a process."""

import os
import subprocess
import sys

import pytest

import dcnzoo
from dcnzoo import commands


def process(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, '-m', 'dcnzoo', *arguments], capture_output=True, text=True, timeout=120, **kwargs
    )


def test_help_names_every_subcommand(dcnzoo):
    code, out, _ = dcnzoo('--help')
    assert code == 0
    assert all(
        name in out for name in ('doctor', 'list', 'predict', 'features', 'offsets', 'shards', 'average', 'digits')
    )


@pytest.mark.parametrize('name', ('doctor', 'list', 'predict', 'features', 'offsets', 'shards', 'average', 'digits'))
def test_help_of_subcommand(dcnzoo, name):
    code, out, err = dcnzoo(name, '--help')
    assert code == 0
    assert f'usage: dcnzoo {name}' in out
    assert not err


def test_version():
    done = process('--version')
    assert (done.returncode, done.stdout, done.stderr) == (0, f'dcnzoo {dcnzoo.__version__}\n', '')


@pytest.mark.parametrize('arguments', ([], ['fly'], ['list', '--colour'], ['predict'], ['predict', 'a.png']))
def test_wrong_usage_exits_with_2(dcnzoo, arguments):
    code, out, err = dcnzoo(*arguments)
    assert (code, out) == (2, '')
    assert 'error:' in err[-1]


def test_process_reports_an_error_in_one_line():
    done = process('predict', 'a.png', '--model', 'dcnv4_tinny')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith("dcnzoo predict: there is no model 'dcnv4_tinny'; did you mean dcnv4_tiny")
    assert done.stderr.count('\n') == 1


def test_closed_pipe_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, '-m', 'dcnzoo', 'list', 'test_dcnv4'], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ''


def test_interrupt(dcnzoo, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('dcnzoo.commands.list.describe', interrupt)
    assert dcnzoo('list') == (130, '', ['dcnzoo: interrupted'])


def test_unexpected_error_is_one_line_and_traceback_shows_it(dcnzoo, monkeypatch, capsys):
    """Without what is secret in it."""
    monkeypatch.setenv('HF_TOKEN', 'plainsecret')

    def fail(*_):
        raise ZeroDivisionError('this\nwas not meant to happen') from OSError('https://host/file?token=plainsecret')

    monkeypatch.setattr('dcnzoo.commands.list.describe', fail)
    assert dcnzoo('list') == (1, '', ['dcnzoo list: ZeroDivisionError: this was not meant to happen'])
    assert commands.main(['--traceback', 'list']) == 1
    said = capsys.readouterr().err
    assert 'Traceback' in said and 'in fail' in said and said.endswith('was not meant to happen\n')
    assert 'OSError: https://host/file\n' in said and 'plainsecret' not in said.replace("token=plainsecret')", '')

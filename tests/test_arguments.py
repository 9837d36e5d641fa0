"""What is typed after `npd`: settings and options in any order, and a word that means nothing."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS

from npd_ascend.arguments import parse


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--config", "c.yaml", "a.b=1", "--dry-run", "c=2"],
        ["run", "a.b=1", "--dry-run", "--config", "c.yaml", "c=2"],
        ["run", "--dry-run", "--config", "c.yaml", "a.b=1", "c=2"],
    ],
)
def test_settings_and_options_in_any_order(words):
    args = parse(words)
    assert (args.config, args.dry_run, args.overrides) == (Path("c.yaml"), True, ["a.b=1", "c=2"])
    args = parse(["replay", "runs/new", "--run", "runs/old", "npd.lambda=0.5"])
    assert (args.run, args.folder, args.overrides) == (Path("runs/old"), Path("runs/new"), ["npd.lambda=0.5"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--config", "c.yaml", "--dryrun"], "npd run does not know --dryrun"),
        (["sft", "--config", "c.yaml", "--dry-run=1"], "npd sft does not know --dry-run=1"),
        (["sweep", "s.yaml", "npd.lambda=1"], "npd sweep does not know npd.lambda=1"),
    ],
)
def test_a_word_that_means_nothing_is_named(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "processes"])
def test_what_only_prints_ends_quietly_when_nobody_reads(command):
    words = [sys.executable, "-u", "-m", "npd_ascend", command, "--config", str(CONFIGS / "addition_cpu.yaml")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == -signal.SIGPIPE

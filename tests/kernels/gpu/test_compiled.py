"""The kernels compiled for GPUs that are not here: some now, all in the committed report."""

from collections.abc import Mapping
from itertools import product

import kernel_report
import pytest
from gates import TARGETS, Row, gate
from kernel_report import REPORT
from loraplex_kernels.gpu.launch import configs
from loraplex_kernels.gpu.ops import KERNELS
from sources import source_hash

FUNCTIONS = {
    "attention.attention",
    "attention.merge",
    "lora.expand",
    "lora.shrink",
    "nf4.dequantize",
    "nf4.linear",
    "nf4.merge",
    "norm.add_rms_norm",
    "rotary.rotary_and_cache",
    "scale.scale_output",
    "silu.silu_mul",
}
"""Every kernel that a launcher launches."""

Committed = tuple[Mapping[str, str], list[Row]]
"""What it was made from, and its rows."""


@pytest.fixture(scope="module")
def report() -> Committed:
    return kernel_report.read(REPORT)


def kernels_and_targets(rows: list[Row]) -> set[tuple[str, str]]:
    return {(f"{row.kernel}.{row.function}", row.target) for row in rows}


def test_a_subset_compiles_through_every_gate() -> None:
    """Llama-3-8B's gate_up and down, in child processes: here Triton interprets."""
    targets = ["sm_80", "sm_90"]

    report = kernel_report.compile_kernels(targets, KERNELS, True, 2, lambda *_: None)

    assert report.refused() == []
    assert kernels_and_targets(report.rows) == set(product(FUNCTIONS, targets))
    per_weight = [row.sass_a_weight for row in report.rows if row.function == "linear"]
    assert len(per_weight) >= 4
    assert all(count is not None and 3 < count <= 8.5 for count in per_weight)


def test_the_committed_report_is_of_these_sources(report: Committed) -> None:
    about, _ = report
    assert about["sources"] == source_hash(), "make kernels-report"


def test_the_committed_report_has_every_kernel_on_every_target(report: Committed) -> None:
    _, rows = report
    assert kernels_and_targets(rows) == set(product(FUNCTIONS, TARGETS))


@pytest.mark.parametrize("kernel", ["attention", "lora", "nf4"])
def test_the_committed_report_has_every_configuration(kernel: str, report: Committed) -> None:
    _, rows = report
    missing = [
        f"{use} for {target}"
        for target in TARGETS
        for use, config in configs(kernel, target).items()
        if not any(row.target == target and is_of(row, kernel, config) for row in rows)
    ]
    assert missing == []


def is_of(row: Row, kernel: str, config: Mapping[str, int]) -> bool:
    """Whether a row has a configuration's options, and those of its values that are constants."""
    constants = dict(part.split("=") for part in row.config.split())
    return (
        row.kernel == kernel
        and row.warps == config.get("num_warps", row.warps)
        and row.stages == config.get("num_stages", row.stages)
        and all(constants[name] == str(config[name]) for name in constants.keys() & config.keys())
    )


def test_every_committed_row_passes_the_gates(report: Committed) -> None:
    _, rows = report
    assert [f"{row}: {why}" for row in rows for why in gate(row)] == []

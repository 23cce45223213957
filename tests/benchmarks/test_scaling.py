"""Which points are measured, and in which picture they end."""

from pathlib import Path

import pytest
from scaling import Sample, Shape, ascending, curves_of, draw, points


def test_curves() -> None:
    base, mixed, adapters, context = curves_of([1, 8, 32], [1, 8, 64], [128, 4096])

    assert base.shapes == {1: Shape(1, 0, 64), 8: Shape(8, 0, 64), 32: Shape(32, 0, 64)}
    assert [shape.adapters for shape in mixed.shapes.values()] == [1, 8, 8]
    assert list(adapters.shapes) == [1, 8]  # no more than one a row
    assert context.shapes == {128: Shape(8, 8, 128), 4096: Shape(8, 8, 4096)}


def test_numbers_ascend() -> None:
    assert ascending("8,1,8") == [1, 8]
    with pytest.raises(Exception, match="not two numbers"):
        ascending("8")


def test_a_picture(tmp_path: Path) -> None:
    curves = curves_of([1, 8], [1, 8], [128, 256])
    samples = {
        shape: [Sample(rate, 100.0) for rate in (10.0, 30.0, 20.0)]
        for curve in curves
        for shape in curve.shapes.values()
    }

    assert points(curves[0], samples) == [(1, 20.0), (8, 20.0)]
    draw(tmp_path / "x.png", curves, samples)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

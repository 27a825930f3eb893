"""The benchmark of many adapters does what it says, at its smallest."""

import re

import pytest

from tests.benchmarks import scale
from tests.benchmarks.adapters import linear_shapes


def test_a_size_is_mirrored_and_its_adapters_are_used_by_a_worker(capsys):
    assert scale.main(["--sizes", "3", "--used", "2", "--server", "moto"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ +3( +[\d.]+){6}$", printed, re.MULTILINE)
    assert re.search(r"^ +3( +1\.00){6}$", printed, re.MULTILINE)


def test_adapters_are_of_the_base_model_and_differ(base):
    shapes = linear_shapes(base, scale.MODULES)
    assert len(shapes) == 3
    one, other = (scale.adapter_files(shapes, number) for number in (1, 2))
    assert one == scale.adapter_files(shapes, 1)
    assert one != other


def test_ratios_are_to_the_smallest_size():
    costs = [
        scale.Cost(100, 20.0, 10.0, 1.0, 8.0, 500.0, 510.0),
        scale.Cost(1000, 10.0, 5.0, 9.0, 8.0, 505.0, 510.0),
    ]
    assert scale.ratios(costs).splitlines()[-1].split() == [
        "1000",
        "0.50",
        "0.50",
        "9.00",
        "1.00",
        "1.01",
        "1.00",
    ]


@pytest.mark.parametrize("arguments", ["--sizes 0", "--used x", "--sizes 10 --used 11", "--server minio"])
def test_arguments_that_make_no_sense_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        scale.main(arguments.split())
    assert raised.value.code == 2
    assert "error: " in capsys.readouterr().err

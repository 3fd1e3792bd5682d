"""The table of accelerators."""

import pytest

from latte_flow_hf.training.devices import DEVICES, find_device


def test_the_table():
    assert find_device("h100") == DEVICES["h100"]
    for device in DEVICES.values():
        assert device.bfloat16 >= device.tf32 >= device.float32 and device.source
        assert 1e10 < device.memory < 1e12 < 2e12 * (device.bandwidth or 0)


def test_numbers_of_ones_own():
    device = find_device("mine", memory_gb=16, tflops=50)
    assert (device.memory, device.bfloat16, device.float32) == (16e9, 50e12, 50e12)
    assert find_device("h100", memory_gb=94).memory == 94e9
    assert find_device("h100", memory_gb=94).bfloat16 == DEVICES["h100"].bfloat16
    assert "given by you" in find_device("h100", tflops=500).source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h1000",), "device must be one of .*'h100'.* got 'h1000'"),
        (("mine", 16), "--memory-gb and --tflops"),
        (("h100", 0), "--memory-gb must be positive and finite, got 0"),
        (("h100", None, -1.0), "--tflops must be positive"),
        (("h100", float("nan")), "--memory-gb must be positive"),
        (("h100", None, float("inf")), "--tflops must be positive and finite, got inf"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_device(*arguments)

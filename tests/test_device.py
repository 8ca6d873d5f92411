"""The choice of a device with fake GPUs, precision, and seeds."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kitlib import device
from kitlib.models.segmenter import Segmenter
from kitlib.recipes.fields import SegmenterRecipe

KAGGLE_BUILD = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.10 for CUDA 12.8


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((6, 0), KAGGLE_BUILD, False),  # P100
        ((7, 5), KAGGLE_BUILD, True),  # T4
        ((8, 9), KAGGLE_BUILD, True),  # L4: sm_86 code runs on a later minor version
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),  # machine code does not cross major versions
        ((9, 0), ["compute_80"], True),  # intermediate code does
        ((9, 0), ["sm_90a"], True),
        ((7, 5), [], False),
    ],
)
def test_supports_follows_cudas_compatibility_rules(capability, built_for, runs):
    assert device.supports(capability, built_for) is runs


def test_channels_are_last_only_on_gpus():
    # Otherwise the backward pass of a ResUNet of width 0.1 crashes on the CPU.
    assert device.memory_format(torch.device("cuda", 1)) is torch.channels_last
    assert device.memory_format(torch.device("cpu")) is torch.contiguous_format


def test_a_narrow_resunet_can_be_trained_on_the_cpu():
    cpu = torch.device("cpu")
    model = Segmenter(SegmenterRecipe(network="resunet", width=0.1)).to(memory_format=device.memory_format(cpu))
    model(model.normalise(torch.zeros(8, 64, 64, dtype=torch.uint8))).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def fake_gpu(monkeypatch, name, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: KAGGLE_BUILD)


def test_a_gpu_that_torch_does_not_support_is_skipped_with_a_warning(monkeypatch, caplog):
    fake_gpu(monkeypatch, "Tesla P100", (6, 0))
    assert device.pick_device() == torch.device("cpu")
    assert "Tesla P100" in caplog.text and "sm_60" in caplog.text


def test_a_gpu_that_fails_at_its_first_operation_is_skipped_with_a_warning(monkeypatch, caplog):
    fake_gpu(monkeypatch, "Tesla T4", (7, 5))

    def fails(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch, "ones", fails)
    assert device.pick_device() == torch.device("cpu")
    assert "no kernel image" in caplog.text


def test_each_process_of_a_shared_training_has_its_own_gpu(monkeypatch):
    fake_gpu(monkeypatch, "Tesla T4", (7, 5))
    tried, real = [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: tried.append(device) or real(size))
    assert device.training_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.training_device() == torch.device("cuda", 1)
    assert tried == [torch.device("cuda", number) for number in (0, 0, 1, 1)]


def test_a_training_does_not_silently_fall_back_to_the_cpu(monkeypatch):
    fake_gpu(monkeypatch, "Tesla P100", (6, 0))
    with pytest.raises(device.DeviceError, match=r"not for the Tesla P100 \(sm_60\)\. On Kaggle choose .*'GPU T4 x2'"):
        device.training_device()
    # Without any GPU, training on the CPU is allowed.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.training_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("real_bf16", "name", "dtype"), [(False, "16-mixed", torch.float16), (True, "bf16-mixed", torch.bfloat16)]
)
def test_emulated_bf16_does_not_count(monkeypatch, real_bf16, name, dtype):
    # A T4 reports bfloat16 support if emulation counts.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or real_bf16)
    assert device.precision(torch.device("cuda")) == name
    assert device.DTYPES[name] == dtype


@pytest.mark.parametrize(
    ("trained", "real_bf16", "chosen", "dtype"),
    [
        ("float16", True, "", torch.float16),
        ("float16", False, "", torch.float16),
        ("bfloat16", True, "", torch.bfloat16),
        ("bfloat16", False, "", torch.float16),  # a T4 has nothing better; overflows are predicted in float32
        ("float32", True, "", torch.bfloat16),
        ("float16", True, "bf16-mixed", torch.bfloat16),
        ("float16", True, "32-true", None),
    ],
)
def test_a_model_predicts_in_the_precision_of_its_training_if_the_gpu_has_it(monkeypatch, trained, real_bf16, chosen, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: real_bf16)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: dtype if enabled else None)
    monkeypatch.setenv("KIT_PRECISION", chosen)
    assert device.autocast(torch.device("cuda"), trained) == dtype
    assert device.RECORDED.keys() == set(device.PRECISIONS)


@pytest.mark.parametrize("name", device.PRECISIONS)
def test_a_gpu_computes_in_the_precision_that_the_environment_names(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setenv("KIT_PRECISION", name)
    assert device.precision(torch.device("cuda")) == name
    assert device.precision(torch.device("cpu")) == "32-true"


def test_a_cpu_can_compute_as_a_gpu_of_another_precision():
    cpu, values = torch.device("cpu"), torch.ones(2, 2)

    def dtype(trained=""):
        with device.autocast(cpu, trained):
            return (values @ values).dtype

    with device.computing_in("bf16-mixed"):
        assert (dtype(), dtype("float16")) == (torch.bfloat16, torch.float16)
        with device.computing_in("16-mixed"):
            assert (dtype(), device.precision(cpu)) == (torch.float16, "16-mixed")
    assert (dtype(), device.precision(cpu)) == (torch.float32, "32-true")


def test_an_unknown_precision_is_refused_with_the_valid_ones(monkeypatch):
    monkeypatch.setenv("KIT_PRECISION", "fp16")
    with pytest.raises(ValueError, match="KIT_PRECISION is 'fp16'; valid: 16-mixed, bf16-mixed, 32-true"):
        device.autocast(torch.device("cpu"))


def test_processes_share_a_gpu_only_with_gloo(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device.gpu_of(process).index for process in range(4)] == [0, 1, 2, 3]
    monkeypatch.setenv("KIT_BACKEND", "gloo")
    assert [device.gpu_of(process).index for process in range(4)] == [0, 1, 0, 1]
    monkeypatch.setenv("KIT_BACKEND", "mpi")
    with pytest.raises(ValueError, match="KIT_BACKEND is 'mpi'; valid: gloo, nccl"):
        device.gpu_of(0)


def test_the_cpu_computes_in_full_precision():
    assert device.precision(torch.device("cpu")) == "32-true"
    with device.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_seed_makes_three_generators_repeat():
    def draw():
        device.seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), unique=True, min_size=2, max_size=20))
def test_derived_seeds_differ_and_fit_numpy(pairs):
    seeds = [device.derived_seed(*pair) for pair in pairs]
    assert len(set(seeds)) == len(pairs)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_without_a_gpu_no_gpu_is_visible_whatever_the_variable_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert device.visible_gpus() == [""]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.visible_gpus() == ["0", "1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert device.visible_gpus() == ["0", "1"]

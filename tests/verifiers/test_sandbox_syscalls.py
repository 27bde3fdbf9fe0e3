"""The tables of system calls, which one machine alone cannot try out."""

import pytest

from cosr_jax.verifiers.sandbox.syscalls import ARCHITECTURES, numbers


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_each_call_has_a_number_of_its_own(machine):
    known = numbers(machine)
    assert len(set(known.values())) == len(known)
    assert all(0 <= number < 512 for number in known.values())


def test_some_numbers_as_the_kernels_headers_have_them():
    wanted = {"read": (0, 63), "openat": (257, 56), "exit_group": (231, 94), "clone": (56, 220)}
    for column, machine in enumerate(ARCHITECTURES):
        known = numbers(machine)
        assert {name: known[name] for name in wanted} == {n: b[column] for n, b in wanted.items()}


def test_the_younger_architecture_has_every_purpose_that_python_needs():
    # The C library of AArch64 makes do with these for the calls that it lacks.
    assert {"openat", "newfstatat", "ppoll", "pselect6", "dup3", "pipe2", "unlinkat"} <= set(
        numbers("aarch64")
    )


def test_an_unknown_machine_is_named():
    with pytest.raises(OSError, match="riscv64"):
        numbers("riscv64")

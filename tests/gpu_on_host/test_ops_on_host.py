# ruff: noqa: F401
"""The public operations of a GPU on the processor."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import test_ops_cuda
from interpreter_repairs import repair
from test_ops_cuda import (
    CONVOLUTIONS,
    ORDERS,
    kernels_run_here,
    test_a_norms_gradients_of_second_order_equal_the_reference,
    test_a_penalty_on_a_layers_gradient_equals_the_references,
    test_an_empty_batch_is_what_torch_makes_of_it,
    test_an_operation_works_in_inference_mode_and_leaves_its_input,
    test_any_strides_give_the_same_numbers,
    test_function_transforms_run_as_plain_torch,
    test_parameters_may_be_of_another_dtype_than_the_input,
    test_running_statistics_that_the_kernel_cannot_reach_move_all_the_same,
    test_sequences_and_float64_are_torchs_and_cannot_be_asked_for,
    test_the_kernels_of_another_device_cannot_be_asked_for,
)

repair()


@pytest.mark.parametrize(
    "backend", ["cuda", *(pytest.param(b, marks=pytest.mark.exhaustive) for b in ("triton", None))]
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_layer_is_the_composition_of_its_parts(kind, order, training, backend):
    test_ops_cuda.test_a_layer_is_the_composition_of_its_parts(kind, order, training, backend)

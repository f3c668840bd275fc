# ruff: noqa: F401
"""BatchNorm + LeakyReLU and pending activations of a GPU on the processor."""

from test_batch_norm_cuda import (
    kernels_run_here,
    test_a_slice_at_an_odd_address_is_read_in_place,
    test_batch_statistics_and_an_activation_that_is_written_later_are_trainings,
    test_fixed_statistics_are_as_accurate_as_torch,
    test_groups_have_statistics_of_their_own,
    test_max_pooling_is_the_cpus,
    test_pending_activations_are_the_cpus,
    test_same_input_gives_the_same_bits,
    test_tiles_of_statistics_are_joined,
    test_training_is_as_accurate_as_torch,
    test_what_is_not_finite_ends_where_torchs_ends,
    test_with_a_residual_it_is_as_accurate_as_torch,
)

# ruff: noqa: F401
"""The GAN losses of a GPU on the processor."""

from test_gan_loss_cuda import (
    kernels_run_here,
    test_a_slice_at_an_odd_address_is_read_in_place,
    test_any_shape_and_strides,
    test_discriminator_is_as_accurate_as_torch,
    test_generator_is_as_accurate_as_torch,
    test_nan_and_infinity_end_where_torchs_end,
    test_same_input_gives_the_same_bits,
    test_second_order_gradients_equal_the_reference,
)

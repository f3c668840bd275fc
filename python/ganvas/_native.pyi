"""Types of the native module (csrc/bindings.cpp). Addresses are integers, 0 where an optional array is left out."""

from collections.abc import Sequence
from enum import IntEnum
from typing import TypedDict

GAN_LOSS_WORKSPACE_BYTES: int

class Dtype(IntEnum):
    float32 = ...
    bfloat16 = ...
    float16 = ...

class GanLoss(IntEnum):
    bce = ...
    non_saturating = ...
    lsgan = ...
    hinge = ...
    wgan = ...
    relativistic = ...

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cpu_isas: list[str]
    cuda: str

def batch_norm_coefficients(
    channels: int,
    groups: int,
    eps: float,
    weight: int,
    bias: int,
    mean: int,
    var: int,
    scale: int,
    shift: int,
    /,
) -> None: ...
def batch_norm_leaky_relu_forward(
    dtype: Dtype,
    rows: int,
    channels: int,
    groups: int,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    training: bool,
    input: int,
    weight: int,
    bias: int,
    mean: int,
    var: int,
    running_mean: int,
    running_var: int,
    momentum: float,
    output: int,
    threads: int,
    /,
) -> None: ...
def batch_norm_leaky_relu_backward(
    dtype: Dtype,
    rows: int,
    channels: int,
    groups: int,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    training: bool,
    grad_output: int,
    input: int,
    weight: int,
    bias: int,
    mean: int,
    var: int,
    grad_input: int,
    grad_weight: int,
    grad_bias: int,
    threads: int,
    /,
) -> None: ...
def batch_norm_add_leaky_relu_forward(
    dtype: Dtype,
    rows: int,
    channels: int,
    groups: int,
    eps: float,
    negative_slope: float,
    training: bool,
    input: int,
    weight: int,
    bias: int,
    mean: int,
    var: int,
    running_mean: int,
    running_var: int,
    momentum: float,
    residual: int,
    output: int,
    threads: int,
    /,
) -> None: ...
def batch_norm_add_leaky_relu_backward(
    dtype: Dtype,
    rows: int,
    channels: int,
    groups: int,
    eps: float,
    negative_slope: float,
    training: bool,
    grad_output: int,
    output: int,
    input: int,
    weight: int,
    bias: int,
    mean: int,
    var: int,
    grad_input: int,
    grad_weight: int,
    grad_bias: int,
    grad_residual: int,
    threads: int,
    /,
) -> None: ...

class ConvolutionKind(IntEnum):
    direct = ...
    conv3x3 = ...
    conv4x4 = ...
    conv_transpose4x4 = ...
    conv3x3_even = ...
    conv3x3_odd = ...
    conv3x3_avg_pool2 = ...
    upsample2_conv3x3 = ...

class Norm(IntEnum):
    none = ...
    fixed = ...
    batch = ...

class Convolution:
    """Of inputs (batch, channels, height, width) of one shape; by Winograd, where it is not direct."""

    def __init__(
        self,
        kind: ConvolutionKind,
        dtype: Dtype,
        integers: bool,
        input_shape: Sequence[int],
        out_channels: int,
        padding: int,
        /,
    ) -> None: ...
    @staticmethod
    def direct(
        dtype: Dtype,
        integers: bool,
        input_shape: Sequence[int],
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        output_padding: Sequence[int],
        transposed: bool,
        /,
    ) -> Convolution: ...
    @property
    def output_shape(self) -> tuple[int, int, int, int]: ...
    def forward(
        self,
        groups: int,
        input: int,
        scale: int,
        shift: int,
        negative_slope: float,
        activation_first: bool,
        weight: int,
        weight_strides: Sequence[int],
        bias: int,
        output: int,
        output_scale: int,
        output_shift: int,
        output_negative_slope: float,
        output_activation_first: bool,
        residual: int,
        threads: int,
        /,
    ) -> None: ...
    def forward_statistics(
        self,
        groups: int,
        input: int,
        scale: int,
        shift: int,
        negative_slope: float,
        activation_first: bool,
        weight: int,
        weight_strides: Sequence[int],
        bias: int,
        output: int,
        bn_weight: int,
        bn_bias: int,
        eps: float,
        bn_activation_first: bool,
        bn_negative_slope: float,
        running_mean: int,
        running_var: int,
        momentum: float,
        mean: int,
        var: int,
        bn_scale: int,
        bn_shift: int,
        threads: int,
        /,
    ) -> None: ...
    def backward_input(
        self,
        groups: int,
        grad_output: int,
        weight: int,
        weight_strides: Sequence[int],
        input: int,
        scale: int,
        shift: int,
        negative_slope: float,
        activation_first: bool,
        mean: int,
        grad_input: int,
        sum: int,
        sum_deviation: int,
        threads: int,
        /,
    ) -> None: ...
    def backward_weight(
        self,
        groups: int,
        input: int,
        scale: int,
        shift: int,
        negative_slope: float,
        activation_first: bool,
        grad_output: int,
        grad_weight: int,
        weight_strides: Sequence[int],
        threads: int,
        /,
    ) -> None: ...

class Chain:
    """Layers in one call. Of each: its convolution forward and those of the gradients of input and weight, strides of
    the weight, numbers of one of bfloat16 (0: it is of float32), whether values per channel are of bfloat16 and whether
    running ones are, norm, eps, negative_slope, activation_first, max_pool, which layer's input it adds to the norm
    (-1: none, -2: the residual), and whether it adds that to the activation instead.
    """

    def __init__(
        self,
        layers: Sequence[
            tuple[
                Convolution,
                Convolution | None,
                Convolution | None,
                Sequence[int],
                int,
                bool,
                bool,
                Norm,
                float,
                float,
                bool,
                bool,
                int,
                bool,
            ]
        ],
        groups: int,
        /,
    ) -> None: ...
    @property
    def statistics_floats(self) -> int: ...
    def forward(
        self,
        input: int,
        residual: int,
        parameters: list[int],
        moving: list[int],
        momenta: list[float],
        kept: list[int],
        statistics: int,
        output: int,
        threads: int,
        /,
    ) -> None: ...
    def backward(
        self,
        grad_output: int,
        input: int,
        output: int,
        parameters: list[int],
        kept: list[int],
        statistics: int,
        grad_input: int,
        grad_residual: int,
        residual_is_input: bool,
        gradients: list[int],
        overwrites_kept: bool,
        threads: int,
        /,
    ) -> None: ...

def channel_sums(dtype: Dtype, rows: int, channels: int, values: int, sums: int, threads: int, /) -> None: ...
def convert(sources: list[int], destinations: list[int], counts: list[int], to: Dtype, threads: int, /) -> None: ...
def max_pool_forward(
    dtype: Dtype,
    input_shape: Sequence[int],
    groups: int,
    input: int,
    scale: int,
    shift: int,
    negative_slope: float,
    activation_first: bool,
    output: int,
    index: int,
    threads: int,
    /,
) -> None: ...
def max_pool_backward(
    dtype: Dtype,
    input_shape: Sequence[int],
    groups: int,
    input: int,
    scale: int,
    shift: int,
    negative_slope: float,
    activation_first: bool,
    grad_output: int,
    index: int,
    training: bool,
    eps: float,
    weight: int,
    mean: int,
    var: int,
    grad_input: int,
    grad_weight: int,
    grad_bias: int,
    threads: int,
    /,
) -> None: ...
def matrix_product(
    rows: int,
    columns: int,
    depth: int,
    a: int,
    a_strides: Sequence[int],
    b: int,
    b_strides: Sequence[int],
    bias: int,
    c: int,
    threads: int,
    /,
) -> None: ...
def transpose(dtype: Dtype, matrices: int, rows: int, columns: int, begin: int, to: int, threads: int, /) -> None: ...
def settle_pending_gradient(
    dtype: Dtype,
    rows: int,
    channels: int,
    groups: int,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    training: bool,
    grad: int,
    stored: int,
    weight: int,
    mean: int,
    var: int,
    sum: int,
    sum_deviation: int,
    grad_weight: int,
    grad_bias: int,
    threads: int,
    /,
) -> None: ...

class Memory:
    """Uninitialised bytes for a tensor, at least as many as are asked for, from the memory that is kept for later."""

    def __init__(self, bytes: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def workspace_bytes_held() -> int: ...
def release_workspace() -> int: ...
def discriminator_loss(
    dtype: Dtype,
    kind: GanLoss,
    label_smoothing: float,
    real: int,
    real_count: int,
    fake: int,
    fake_count: int,
    grad_real: int,
    grad_fake: int,
    loss: int,
    metrics: int,
    threads: int,
    /,
) -> None: ...
def generator_loss(
    dtype: Dtype,
    kind: GanLoss,
    fake: int,
    real: int,
    count: int,
    grad_fake: int,
    grad_real: int,
    loss: int,
    threads: int,
    /,
) -> None: ...

# The CUDA entry points are there only in a build with nvcc. `workspace` holds `workspace_bytes`, at least as many as
# the function of that name says.
def batch_norm_workspace_cuda(dtype: Dtype, rows: int, channels: int, groups: int, device: int, /) -> int: ...
def batch_norm_leaky_relu_forward_cuda(
    dtype: Dtype,
    rows: int,
    channels: int,
    groups: int,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    training: bool,
    input: int,
    weight: int,
    bias: int,
    mean: int,
    var: int,
    running_mean: int,
    running_var: int,
    momentum: float,
    residual: int,
    output: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def batch_statistics_workspace_cuda(dtype: Dtype, rows: int, channels: int, groups: int, device: int, /) -> int: ...
def batch_statistics_cuda(
    dtype: Dtype,
    rows: int,
    channels: int,
    groups: int,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    input: int,
    weight: int,
    bias: int,
    running_mean: int,
    running_var: int,
    momentum: float,
    mean: int,
    var: int,
    scale: int,
    shift: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def batch_norm_leaky_relu_backward_cuda(
    dtype: Dtype,
    rows: int,
    channels: int,
    groups: int,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    training: bool,
    grad_output: int,
    output: int,
    input: int,
    weight: int,
    bias: int,
    mean: int,
    var: int,
    grad_input: int,
    grad_weight: int,
    grad_bias: int,
    grad_residual: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def settle_pending_gradient_cuda(
    dtype: Dtype,
    rows: int,
    channels: int,
    groups: int,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    training: bool,
    grad: int,
    stored: int,
    weight: int,
    mean: int,
    var: int,
    sums: int,
    grad_weight: int,
    grad_bias: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def finish_statistics_workspace_cuda(groups: int, tiles: int, channels: int, /) -> int: ...
def finish_statistics_cuda(
    groups: int,
    tiles: int,
    channels: int,
    counts: int,
    means: int,
    deviations: int,
    weight: int,
    bias: int,
    eps: float,
    running_mean: int,
    running_var: int,
    momentum: float,
    mean: int,
    var: int,
    scale: int,
    shift: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def max_pool_workspace_cuda(dtype: Dtype, input_shape: Sequence[int], groups: int, device: int, /) -> int: ...
def max_pool_forward_cuda(
    dtype: Dtype,
    input_shape: Sequence[int],
    groups: int,
    input: int,
    weight: int,
    bias: int,
    mean: int,
    var: int,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    output: int,
    index: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def max_pool_backward_cuda(
    dtype: Dtype,
    input_shape: Sequence[int],
    groups: int,
    input: int,
    weight: int,
    bias: int,
    mean: int,
    var: int,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    grad_output: int,
    index: int,
    training: bool,
    grad_input: int,
    grad_weight: int,
    grad_bias: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...

# The GAN losses' workspace holds GAN_LOSS_WORKSPACE_BYTES.
def discriminator_loss_cuda(
    dtype: Dtype,
    kind: GanLoss,
    label_smoothing: float,
    real: int,
    real_count: int,
    fake: int,
    fake_count: int,
    grad_real: int,
    grad_fake: int,
    loss: int,
    metrics: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def generator_loss_cuda(
    dtype: Dtype,
    kind: GanLoss,
    fake: int,
    real: int,
    count: int,
    grad_fake: int,
    grad_real: int,
    loss: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_refusal(device: int, /) -> str: ...
def build_info() -> BuildInfo: ...
def environment_variable(name: str, /) -> str | None: ...
def selected_isa() -> str: ...
def has_bfloat16_tiles() -> bool: ...

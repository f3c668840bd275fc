// The part that is compiled once: what each kind of convolution is computed by, and the choice of instruction set.
#include "convolutions.h"

#include <algorithm>

#include "../require.h"
#include "parallel.h"
#include "workspace.h"

namespace ganvas::cpu {
namespace {

constexpr float even_rows[4][3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {0, 0, 0}};
constexpr float odd_rows[4][3] = {{0, 0, 0}, {1, 0, 0}, {0, 1, 0}, {0, 0, 1}};  // of a kernel that begins a pixel early
constexpr float pooled_rows[4][3] = {{0.5, 0, 0}, {0.5, 0.5, 0}, {0, 0.5, 0.5}, {0, 0, 0.5}};
constexpr float upsampled_rows[4][3] = {{0, 0, 1}, {0, 1, 1}, {1, 1, 0}, {1, 0, 0}};

enum class Family { direct, winograd, winograd_stride2, winograd_stride2_transposed, amx };

struct Form {
    Family family;
    const float (*rows)[3] = nullptr;  // M; null: the kernel is the weight itself
    std::int64_t begins_early = 0;     // by so many pixels, which are padding
};

Form form_of(ConvolutionKind kind) {
    switch (kind) {
        case ConvolutionKind::conv3x3:
            return {Family::winograd};
        case ConvolutionKind::conv4x4:
            return {Family::winograd_stride2};
        case ConvolutionKind::conv_transpose4x4:
            return {Family::winograd_stride2_transposed};
        case ConvolutionKind::conv3x3_even:
            return {Family::winograd_stride2, even_rows};
        case ConvolutionKind::conv3x3_odd:
            return {Family::winograd_stride2, odd_rows, 1};
        case ConvolutionKind::conv3x3_avg_pool2:
            return {Family::winograd_stride2, pooled_rows};
        case ConvolutionKind::upsample2_conv3x3:
            return {Family::winograd_stride2_transposed, upsampled_rows};
        default:
            return {Family::direct};
    }
}

std::int64_t output_length(ConvolutionKind kind, const ConvolutionShape& s, std::int64_t length,
                           const KernelAxis& axis) {
    const std::int64_t padding = s.padding + form_of(kind).begins_early;
    switch (form_of(kind).family) {
        case Family::winograd:
            return length + 2 * padding - 2;
        case Family::winograd_stride2:
            return length + 2 * padding < 4 ? 0 : (length + 2 * padding - 4) / 2 + 1;
        case Family::winograd_stride2_transposed:
            return 2 * (length - 1) - 2 * padding + 4;
        default: {
            const std::int64_t reach = axis.dilation * (axis.size - 1) - 2 * axis.padding;
            if (s.transposed) return (length - 1) * axis.stride + reach + axis.output_padding + 1;
            return length <= reach ? 0 : (length - reach - 1) / axis.stride + 1;
        }
    }
}

void require_axis(const KernelAxis& axis) {
    require(axis.size >= 1 && axis.stride >= 1 && axis.dilation >= 1 && axis.padding >= 0 && axis.output_padding >= 0,
            "kernel, stride and dilation must be at least 1, paddings at least 0; got ", axis.size, ", ", axis.stride,
            ", ", axis.dilation, ", ", axis.padding, " and ", axis.output_padding);
}

void require_geometry(ConvolutionKind kind, const ConvolutionShape& s) {
    const Form form = form_of(kind);
    if (form.family == Family::direct) {
        require_axis(s.rows);
        return require_axis(s.columns);
    }
    require(s.padding >= 0 && s.padding <= 2, "padding must be 0, 1 or 2; got ", s.padding);
    require(!form.rows || s.padding == 1, "padding must be 1 here; got ", s.padding);
    const bool parity = kind == ConvolutionKind::conv3x3_odd;
    if (parity || kind == ConvolutionKind::conv3x3_even)
        require(s.height % 2 == parity && s.width % 2 == parity, "sides must be ", parity ? "odd" : "even", "; got ",
                s.height, "×", s.width);
}

// Arithmetic outweighs memory here: each byte is worth as many threads as about in_channels + out_channels would be.
int team(const ConvolutionShape& s, int threads) {
    const std::int64_t taps = std::max<std::int64_t>(9, s.rows.size * s.columns.size);
    const std::int64_t weight_bytes = taps * s.in_channels * s.out_channels * 4;
    return team_size((input_bytes(s) + output_bytes(s) + weight_bytes) * 8, threads);
}

#if defined(__x86_64__)
#define DISPATCH_AMX(CALL) return avx512::amx_##CALL;
#else
#define DISPATCH_AMX(CALL) [[fallthrough]];
#endif
#define DISPATCH_FAMILY(pass)                                   \
    switch (family) {                                           \
        case Family::amx:                                       \
            DISPATCH_AMX(pass)                                  \
        case Family::direct:                                    \
            GANVAS_DISPATCH(direct_##pass)                      \
        case Family::winograd:                                  \
            GANVAS_DISPATCH(winograd_##pass)                    \
        case Family::winograd_stride2:                          \
            GANVAS_DISPATCH(winograd_stride2_##pass)            \
        default:                                                \
            GANVAS_DISPATCH(winograd_stride2_transposed_##pass) \
    }

void run(Family family, const ConvolutionForward& args, int threads) {
    DISPATCH_FAMILY(forward(args, threads))
}

void run(Family family, const ConvolutionBackwardInput& args, int threads) {
    DISPATCH_FAMILY(backward_input(args, threads))
}

void run(Family family, const ConvolutionBackwardWeight& args, int threads) {
    DISPATCH_FAMILY(backward_weight(args, threads))
}
#undef DISPATCH_FAMILY
#undef DISPATCH_AMX

constexpr std::int64_t tile_planes_most = 256;

// Products of tiles are so much faster than others that any convolution is best computed by its definition, unless its
// stride leaves but a few pixels to each plane.
Family family_of(const Form& form, const ConvolutionShape& s) {
    const bool has_planes = s.rows.stride * s.columns.stride <= tile_planes_most;
    return s.integers && has_planes && has_bfloat16_tiles() ? Family::amx : form.family;
}

constexpr std::int64_t neighbours_most = 32, neighbour_bytes = 2 << 20;

// Where the kernel is as large as the map, or makes a map of one pixel, images are as well stretches of a row, along
// which it goes in steps of its own length. Pixels of some images are then neighbours, which are multiplied together.
ConvolutionShape in_rows(ConvolutionShape s, const ConvolutionWeight& weight) {
    const auto covers = [](const KernelAxis& kernel, std::int64_t length) {
        return kernel.size == length && kernel.padding == 0 && kernel.dilation == 1 && kernel.output_padding == 0;
    };
    const std::int64_t height = s.transposed ? s.out_height : s.height, width = s.transposed ? s.out_width : s.width;
    if (!covers(s.rows, height) || !covers(s.columns, width)) return s;
    if (height > 1 && weight.row != width * weight.column) return s;
    const std::int64_t pixels = height * width, images = s.batch / s.groups;
    const std::int64_t bytes = pixels * std::max(s.in_channels, s.out_channels) * element_bytes(s.dtype);
    std::int64_t neighbours = std::clamp<std::int64_t>(neighbour_bytes / bytes, 1, std::min(neighbours_most, images));
    while (images % neighbours != 0) --neighbours;
    if (neighbours == 1) return s;
    s.batch /= neighbours;
    s.height = s.out_height = 1;
    s.width = s.transposed ? neighbours : neighbours * pixels;
    s.out_width = s.transposed ? neighbours * pixels : neighbours;
    s.rows = {1, 1, 0, 1, 0};
    s.columns = {pixels, pixels, 0, 1, 0};
    return s;
}

// The shape that the form's family computes.
ConvolutionShape computed_shape(const Form& form, ConvolutionShape s, const ConvolutionWeight& weight) {
    s.padding += form.begins_early;
    return form.family == Family::direct ? in_rows(s, weight) : s;
}

void fold_weight(const FoldedWeight& args, int threads) {
    GANVAS_DISPATCH(fold_weight(args, threads))
}

void unfold_gradient(const FoldedWeight& args, float* gradient, int threads) {
    GANVAS_DISPATCH(unfold_gradient(args, gradient, threads))
}

// The kernel that M makes of a weight, in memory that lasts as long as this object.
class Folded {
  public:
    Folded(const ConvolutionShape& s, const float (*rows)[3], const ConvolutionWeight& weight)
        : workspace_(bytes(s)),
          args_{rows, s.in_channels, s.out_channels, weight, static_cast<float*>(workspace_.take(bytes(s)))} {}
    // Threads for so many channels: folding is some 100 operations for each pair of them.
    int team(int threads) const { return team_size(args_.in_channels * args_.out_channels * 64, threads); }
    ConvolutionWeight kernel() const {
        const std::int64_t tap = args_.in_channels * args_.out_channels;
        return {args_.kernel, 1, args_.out_channels, 4 * tap, tap};
    }
    const FoldedWeight& args() const { return args_; }

  private:
    static std::size_t bytes(const ConvolutionShape& s) {
        return static_cast<std::size_t>(16 * s.in_channels * s.out_channels) * sizeof(float);
    }
    Workspace workspace_;
    FoldedWeight args_;
};

// Calls run(args) with the kernel in place of the weight, and the padding that goes with it.
template <class Args>
void run_folded(ConvolutionKind kind, Args args, int threads) {
    const Form form = form_of(kind);
    args.shape = computed_shape(form, args.shape, args.weight);
    const Family family = family_of(form, args.shape);
    if (!form.rows) return run(family, args, threads);
    const Folded folded(args.shape, form.rows, args.weight);
    fold_weight(folded.args(), folded.team(threads));
    args.weight = folded.kernel();
    run(family, args, threads);
}

}  // namespace

std::int64_t input_bytes(const ConvolutionShape& s) {
    return s.batch * s.height * s.width * s.in_channels * element_bytes(s.dtype);
}

std::int64_t output_bytes(const ConvolutionShape& s) {
    return s.batch * s.out_height * s.out_width * s.out_channels * element_bytes(s.dtype);
}

Convolution::Convolution(ConvolutionKind kind, const ConvolutionShape& s) : kind(kind), shape(s) {
    require(s.batch >= 1 && s.in_channels >= 1 && s.out_channels >= 1,
            "batch and channels must be at least 1; got batch ", s.batch, ", channels ", s.in_channels, " and ",
            s.out_channels);
    require(s.height >= 1 && s.width >= 1, "the map must have pixels; got ", s.height, "×", s.width);
    require_geometry(kind, s);
    const Form form = form_of(kind);
    if (form.family != Family::direct) {
        const std::int64_t size = form.family == Family::winograd ? 3 : 4,
                           stride = form.family == Family::winograd ? 1 : 2;
        shape.rows = shape.columns = {size, stride, s.padding + form.begins_early, 1, 0};
        shape.transposed = form.family == Family::winograd_stride2_transposed;
    }
    shape.out_height = output_length(kind, s, s.height, s.rows);
    shape.out_width = output_length(kind, s, s.width, s.columns);
    require(shape.out_height >= 1 && shape.out_width >= 1, "the output would be empty; got a map of ", s.height, "×",
            s.width, " and padding ", kind == ConvolutionKind::direct ? s.rows.padding : s.padding);
    shape.groups = 1;
}

ConvolutionShape Convolution::grouped(std::int64_t groups) const {
    require(groups >= 1 && shape.batch % groups == 0, "groups must divide the batch; got ", groups, " groups, batch ",
            shape.batch);
    ConvolutionShape s = shape;
    s.groups = groups;
    return s;
}

void Convolution::forward(ConvolutionForward args, int threads) const {
    expect_first_touch(args.output, output_bytes(shape));
    run_folded(kind, args, team(shape, threads));
}

void Convolution::backward_input(ConvolutionBackwardInput args, int threads) const {
    expect_first_touch(args.grad_input, input_bytes(shape));
    run_folded(kind, args, team(shape, threads));
}

void Convolution::backward_weight(ConvolutionBackwardWeight args, int threads) const {
    const Form form = form_of(kind);
    threads = team(shape, threads);
    args.shape = computed_shape(form, args.shape, args.layout);
    const Family family = family_of(form, args.shape);
    if (!form.rows) return run(family, args, threads);
    const Folded folded(shape, form.rows, args.layout);
    float* const gradient = args.grad_weight;
    args.grad_weight = folded.args().kernel;
    args.layout = folded.kernel();
    run(family, args, threads);
    unfold_gradient(folded.args(), gradient, folded.team(threads));
}

}  // namespace ganvas::cpu

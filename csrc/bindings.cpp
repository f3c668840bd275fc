// Every native entry point, one page. Python passes addresses as integers, allocates every tensor and keeps it alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/batch_norm_leaky_relu.h"
#include "cpu/chain.h"
#include "cpu/channel_sums.h"
#include "cpu/conversion.h"
#include "cpu/convolutions.h"
#include "cpu/gan_loss.h"
#include "cpu/isa.h"
#include "cpu/kept_weights.h"
#include "cpu/matrix_product.h"
#include "cpu/max_pool.h"
#include "cpu/pending_gradient.h"
#include "cpu/transposition.h"
#include "cpu/workspace.h"
#include "require.h"
#if GANVAS_WITH_CUDA
#include "cuda/batch_norm_leaky_relu.h"
#include "cuda/device.h"
#include "cuda/gan_loss.h"
#include "cuda/max_pool.h"
#include "cuda/statistics.h"
#endif

namespace pybind11::detail {

// An enumeration whose members are those of an IntEnum in Python, by their numbers: pybind11's own enumerations take
// longer to read than all other arguments of a call together.
template <class Enum, int count>
struct numbered {
    PYBIND11_TYPE_CASTER(Enum, const_name("int"));

    bool load(handle member, bool) {
        if (!PyLong_Check(member.ptr())) return false;
        const long number = PyLong_AsLong(member.ptr());
        if (number == -1) PyErr_Clear();  // an integer that no long holds
        value = static_cast<Enum>(number);
        return number >= 0 && number < count;
    }
};
template <>
struct type_caster<ganvas::Dtype> : numbered<ganvas::Dtype, 3> {};
template <>
struct type_caster<ganvas::GanLoss> : numbered<ganvas::GanLoss, 6> {};
template <>
struct type_caster<ganvas::cpu::ConvolutionKind>
    : numbered<ganvas::cpu::ConvolutionKind, static_cast<int>(ganvas::cpu::ConvolutionKind::count)> {};
template <>
struct type_caster<ganvas::cpu::Norm> : numbered<ganvas::cpu::Norm, static_cast<int>(ganvas::cpu::Norm::count)> {};

}  // namespace pybind11::detail

namespace py = pybind11;
using namespace ganvas;
using namespace ganvas::cpu;
using Address = std::uintptr_t;

namespace {

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void require_address(const char* name, Address address, std::size_t alignment) {
    require(address != 0, name, " must not be null");
    require(address % alignment == 0, name, " must be aligned to ", alignment, " bytes; got address ", address);
}

std::size_t element_size(Dtype dtype) {
    return static_cast<std::size_t>(element_bytes(dtype));
}

void require_cpu_dtype(Dtype dtype) {
    require(dtype != Dtype::float16, "the CPU kernels take float32 and bfloat16; got float16");
}

void require_batch_norm_sizes(std::int64_t rows, std::int64_t channels, std::int64_t groups) {
    require(rows >= 1 && channels >= 1, "rows and channels must be at least 1; got ", rows, " and ", channels);
    require(groups >= 1 && rows % groups == 0, "groups must divide rows; got ", groups, " groups, ", rows, " rows");
}

BatchNormShape batch_norm_shape(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups, float eps,
                                float negative_slope, bool activation_first) {
    require_cpu_dtype(dtype);
    require_batch_norm_sizes(rows, channels, groups);
    return {dtype, rows, channels, groups, eps, negative_slope, activation_first};
}

void batch_norm_leaky_relu_forward_(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                    float eps, float negative_slope, bool activation_first, bool training,
                                    Address input, Address weight, Address bias, Address mean, Address var,
                                    Address running_mean, Address running_var, float momentum, Address output,
                                    int threads) {
    const auto shape = batch_norm_shape(dtype, rows, channels, groups, eps, negative_slope, activation_first);
    require_address("input", input, element_size(dtype));
    require_address("output", output, element_size(dtype));
    require_address("mean", mean, 4);
    require_address("var", var, 4);
    require((running_mean == 0) == (running_var == 0), "running_mean and running_var go together");
    batch_norm_leaky_relu_forward({shape, pointer<void>(input), pointer<float>(weight), pointer<float>(bias), training,
                                   pointer<float>(mean), pointer<float>(var), pointer<float>(running_mean),
                                   pointer<float>(running_var), momentum, nullptr, false, pointer<void>(output)},
                                  threads);
}

void batch_norm_coefficients_(std::int64_t channels, std::int64_t groups, float eps, Address weight, Address bias,
                              Address mean, Address var, Address scale, Address shift) {
    require(channels >= 1 && groups >= 1, "channels and groups must be at least 1; got ", channels, " and ", groups);
    for (Address address : {mean, var, scale, shift}) require_address("statistics", address, 4);
    batch_norm_coefficients({channels, groups, eps, pointer<float>(weight), pointer<float>(bias), pointer<float>(mean),
                             pointer<float>(var), pointer<float>(scale), pointer<float>(shift)});
}

void batch_norm_add_leaky_relu_forward_(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                        float eps, float negative_slope, bool training, Address input, Address weight,
                                        Address bias, Address mean, Address var, Address running_mean,
                                        Address running_var, float momentum, Address residual, Address output,
                                        int threads) {
    const auto shape = batch_norm_shape(dtype, rows, channels, groups, eps, negative_slope, false);
    for (Address address : {input, residual, output})
        require_address("input, residual and output", address, element_size(dtype));
    require_address("mean", mean, 4);
    require_address("var", var, 4);
    require((running_mean == 0) == (running_var == 0), "running_mean and running_var go together");
    batch_norm_leaky_relu_forward(
        {shape, pointer<void>(input), pointer<float>(weight), pointer<float>(bias), training, pointer<float>(mean),
         pointer<float>(var), pointer<float>(running_mean), pointer<float>(running_var), momentum,
         pointer<void>(residual), false, pointer<void>(output)},
        threads);
}

void batch_norm_leaky_relu_backward_(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                     float eps, float negative_slope, bool activation_first, bool training,
                                     Address grad_output, Address input, Address weight, Address bias, Address mean,
                                     Address var, Address grad_input, Address grad_weight, Address grad_bias,
                                     int threads) {
    const auto shape = batch_norm_shape(dtype, rows, channels, groups, eps, negative_slope, activation_first);
    require_address("grad_output", grad_output, element_size(dtype));
    require_address("input", input, element_size(dtype));
    require_address("grad_input", grad_input, element_size(dtype));
    require_address("mean", mean, 4);
    require_address("var", var, 4);
    require_address("grad_weight", grad_weight, 4);
    require_address("grad_bias", grad_bias, 4);
    batch_norm_leaky_relu_backward(
        {shape, pointer<void>(grad_output), pointer<void>(input), pointer<float>(weight), pointer<float>(bias),
         pointer<float>(mean), pointer<float>(var), training, pointer<void>(grad_input), pointer<float>(grad_weight),
         pointer<float>(grad_bias), nullptr, nullptr},
        threads);
}

void batch_norm_add_leaky_relu_backward_(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                         float eps, float negative_slope, bool training, Address grad_output,
                                         Address output, Address input, Address weight, Address bias, Address mean,
                                         Address var, Address grad_input, Address grad_weight, Address grad_bias,
                                         Address grad_residual, int threads) {
    const auto shape = batch_norm_shape(dtype, rows, channels, groups, eps, negative_slope, false);
    require(negative_slope >= 0,
            "a slope below 0 leaves no trace of the kink's side in the output; got " + std::to_string(negative_slope));
    for (Address address : {grad_output, output, input, grad_input, grad_residual})
        require_address("output, input and their gradients", address, element_size(dtype));
    for (Address address : {mean, var, grad_weight, grad_bias}) require_address("per-channel values", address, 4);
    batch_norm_leaky_relu_backward(
        {shape, pointer<void>(grad_output), pointer<void>(input), pointer<float>(weight), pointer<float>(bias),
         pointer<float>(mean), pointer<float>(var), training, pointer<void>(grad_input), pointer<float>(grad_weight),
         pointer<float>(grad_bias), pointer<void>(output), pointer<void>(grad_residual)},
        threads);
}

using Strides = std::array<std::int64_t, 4>;

ConvolutionShape convolution_shape(Dtype dtype, bool integers, const Strides& input_shape, std::int64_t out_channels) {
    require_cpu_dtype(dtype);
    const auto [batch, channels, height, width] = input_shape;
    return {dtype, integers, batch, height, width, 0, 0, channels, out_channels, 0, 1, {}, {}, false};
}

std::shared_ptr<Convolution> make_convolution(ConvolutionKind kind, Dtype dtype, bool integers,
                                              const Strides& input_shape, std::int64_t out_channels,
                                              std::int64_t padding) {
    require(kind != ConvolutionKind::direct, "Convolution.direct makes a direct one");
    ConvolutionShape shape = convolution_shape(dtype, integers, input_shape, out_channels);
    shape.padding = padding;
    return std::make_shared<Convolution>(kind, shape);
}

using Pair = std::array<std::int64_t, 2>;

std::shared_ptr<Convolution> make_direct_convolution(Dtype dtype, bool integers, const Strides& input_shape,
                                                     std::int64_t out_channels, const Pair& kernel, const Pair& stride,
                                                     const Pair& padding, const Pair& dilation,
                                                     const Pair& output_padding, bool transposed) {
    ConvolutionShape shape = convolution_shape(dtype, integers, input_shape, out_channels);
    shape.rows = {kernel[0], stride[0], padding[0], dilation[0], output_padding[0]};
    shape.columns = {kernel[1], stride[1], padding[1], dilation[1], output_padding[1]};
    shape.transposed = transposed;
    return std::make_shared<Convolution>(ConvolutionKind::direct, shape);
}

PendingActivation pending_activation(const ConvolutionShape& shape, Address stored, Address scale, Address shift,
                                     float negative_slope, bool activation_first) {
    require_address("input", stored, element_size(shape.dtype));
    require((scale == 0) == (shift == 0), "scale and shift go together");
    return {pointer<void>(stored), pointer<float>(scale), pointer<float>(shift), negative_slope, activation_first};
}

// Strides of the output's channels, the input's, rows and columns: a transposed convolution's weight has them in
// another order.
ConvolutionWeight convolution_weight(Address values, const Strides& strides) {
    require_address("weight", values, 4);
    return {pointer<float>(values), strides[0], strides[1], strides[2], strides[3]};
}

void convolution_forward_(const Convolution& convolution, std::int64_t groups, Address input, Address scale,
                          Address shift, float negative_slope, bool activation_first, Address weight,
                          const Strides& weight_strides, Address bias, Address output, Address output_scale,
                          Address output_shift, float output_negative_slope, bool output_activation_first,
                          Address residual, int threads) {
    const auto shape = convolution.grouped(groups);
    require_address("output", output, element_size(shape.dtype));
    require((output_scale == 0) == (output_shift == 0), "output_scale and output_shift go together");
    require(residual == 0 || output_scale != 0, "a residual is added before the activation; got no output_scale");
    convolution.forward({shape,
                         pending_activation(shape, input, scale, shift, negative_slope, activation_first),
                         convolution_weight(weight, weight_strides),
                         pointer<float>(bias),
                         pointer<void>(output),
                         {},
                         {pointer<void>(residual), pointer<float>(output_scale), pointer<float>(output_shift),
                          output_negative_slope, output_activation_first},
                         false,
                         output_scale != 0},
                        threads);
}

void convolution_forward_statistics_(const Convolution& convolution, std::int64_t groups, Address input, Address scale,
                                     Address shift, float negative_slope, bool activation_first, Address weight,
                                     const Strides& weight_strides, Address bias, Address output, Address bn_weight,
                                     Address bn_bias, float eps, bool bn_activation_first, float bn_negative_slope,
                                     Address running_mean, Address running_var, float momentum, Address mean,
                                     Address var, Address bn_scale, Address bn_shift, int threads) {
    const auto shape = convolution.grouped(groups);
    require_address("output", output, element_size(shape.dtype));
    for (Address address : {mean, var, bn_scale, bn_shift}) require_address("statistics", address, 4);
    require((running_mean == 0) == (running_var == 0), "running_mean and running_var go together");
    convolution.forward(
        {shape,
         pending_activation(shape, input, scale, shift, negative_slope, activation_first),
         convolution_weight(weight, weight_strides),
         pointer<float>(bias),
         pointer<void>(output),
         {pointer<float>(bn_weight), pointer<float>(bn_bias), eps, bn_activation_first, bn_negative_slope,
          pointer<float>(running_mean), pointer<float>(running_var), momentum, pointer<float>(mean),
          pointer<float>(var), pointer<float>(bn_scale), pointer<float>(bn_shift)},
         {},
         false,
         false},
        threads);
}

void convolution_backward_input_(const Convolution& convolution, std::int64_t groups, Address grad_output,
                                 Address weight, const Strides& weight_strides, Address input, Address scale,
                                 Address shift, float negative_slope, bool activation_first, Address mean,
                                 Address grad_input, Address sum, Address sum_deviation, int threads) {
    const auto shape = convolution.grouped(groups);
    require_address("grad_output", grad_output, element_size(shape.dtype));
    require_address("grad_input", grad_input, element_size(shape.dtype));
    require(scale == 0 || input != 0, "a pending input needs its stored values");
    require((scale == 0) == (shift == 0), "scale and shift go together");
    convolution.backward_input(
        {shape,
         pointer<void>(grad_output),
         convolution_weight(weight, weight_strides),
         {pointer<void>(input), pointer<float>(scale), pointer<float>(shift), negative_slope, activation_first},
         pointer<float>(mean),
         pointer<void>(grad_input),
         pointer<float>(sum),
         pointer<float>(sum_deviation),
         nullptr,
         nullptr},
        threads);
}

void convolution_backward_weight_(const Convolution& convolution, std::int64_t groups, Address input, Address scale,
                                  Address shift, float negative_slope, bool activation_first, Address grad_output,
                                  Address grad_weight, const Strides& weight_strides, int threads) {
    const auto shape = convolution.grouped(groups);
    require_address("grad_output", grad_output, element_size(shape.dtype));
    require_address("grad_weight", grad_weight, 4);
    convolution.backward_weight({shape,
                                 pending_activation(shape, input, scale, shift, negative_slope, activation_first),
                                 pointer<void>(grad_output),
                                 pointer<float>(grad_weight),
                                 {nullptr, weight_strides[0], weight_strides[1], weight_strides[2], weight_strides[3]}},
                                threads);
}

// forward, backward_input and backward_weight, strides of the weight, numbers of one of bfloat16, whether values per
// channel are and whether running ones are, norm, eps, negative_slope, activation_first, max_pool, adds and adds_last.
using LayerArguments =
    std::tuple<std::shared_ptr<Convolution>, std::shared_ptr<Convolution>, std::shared_ptr<Convolution>, Strides,
               std::int64_t, bool, bool, Norm, float, float, bool, bool, std::int64_t, bool>;

Chain make_chain(const std::vector<LayerArguments>& arguments, std::int64_t groups) {
    std::vector<ChainLayer> layers;
    for (const auto& [forward, into, of_weight, strides, narrow, values, moving, norm, eps, slope, first, pool, adds,
                      adds_last] : arguments)
        layers.push_back({forward, into, of_weight, strides, narrow, values, moving, norm, eps, slope, first, pool,
                          adds, adds_last});
    return Chain(std::move(layers), groups);
}

using Addresses = std::vector<Address>;

// So many of each layer: weight, bias, γ and β; running mean, running variance and count of batches; stored, written
// and winners.
constexpr std::size_t parameter_count = 4, moving_count = 3, kept_count = 3;

const Address* of_layer(const char* name, const Addresses& addresses, std::size_t count, std::size_t layer,
                        std::size_t layers) {
    require(addresses.size() == count * layers, "each layer has ", count, " ", name, "; got ", addresses.size(),
            " for ", layers, " layers");
    return addresses.data() + count * layer;
}

// Values per channel as a chain has them, float32: in their own places, or for the time of a call in a copy of them.
class ChannelValues {
  public:
    enum Use { read = 1, written = 2 };

    // Of up to so many values per channel.
    ChannelValues(const Chain& chain, std::size_t most) {
        std::size_t count = 0;
        for (const ChainLayer& layer : chain.layers())
            count += layer.narrow_values || layer.narrow_moving ? most * channels(layer) : 0;
        floats_.resize(count);
    }
    float* of(const ChainLayer& layer, bool narrow, Address address, int use) {
        if (!narrow || address == 0) return pointer<float>(address);
        float* const copy = floats_.data() + used_;
        used_ += channels(layer);
        const auto count = static_cast<std::int64_t>(channels(layer));
        if (use & read) reads_.push_back({pointer<void>(address), copy, count});
        if (use & written) writes_.push_back({copy, pointer<void>(address), count});
        return copy;
    }
    void fetch() const { convert(reads_, Dtype::float32, 1); }
    void put_back() const { convert(writes_, Dtype::bfloat16, 1); }

  private:
    static std::size_t channels(const ChainLayer& layer) {
        return static_cast<std::size_t>(layer.shape().out_channels);
    }

    std::vector<float> floats_;
    std::size_t used_ = 0;
    std::vector<Conversion> reads_, writes_;
};

// Without `moving` there are no running statistics, without `kept` nothing is kept.
std::vector<LayerTensors> layer_tensors(const Chain& chain, const Addresses& parameters, const Addresses& moving,
                                        const std::vector<float>& momenta, const Addresses& kept,
                                        ChannelValues& values) {
    const std::size_t count = chain.layers().size(), alignment = element_size(chain.first().dtype);
    std::vector<LayerTensors> tensors;
    tensors.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
        const ChainLayer& layer = chain.layers()[i];
        LayerTensors own{};
        const Address* of = of_layer("parameters", parameters, parameter_count, i, count);
        require_address("weight", of[0], layer.narrow_weight ? 2 : 4);
        own.weight = pointer<void>(of[0]);
        own.bias = values.of(layer, layer.narrow_values, of[1], ChannelValues::read);
        own.bn_weight = values.of(layer, layer.narrow_values, of[2], ChannelValues::read);
        own.bn_bias = values.of(layer, layer.narrow_values, of[3], ChannelValues::read);
        if (!moving.empty()) {
            of = of_layer("moving statistics", moving, moving_count, i, count);
            require((of[0] == 0) == (of[1] == 0), "running_mean and running_var go together");
            require(layer.norm != Norm::fixed || of[0] != 0, "fixed statistics must be given");
            const int use = ChannelValues::read | (layer.norm == Norm::batch ? ChannelValues::written : 0);
            own.running_mean = values.of(layer, layer.narrow_moving, of[0], use);
            own.running_var = values.of(layer, layer.narrow_moving, of[1], use);
            own.batches = pointer<std::int64_t>(of[2]);
            require(momenta.size() == count, "each layer has a momentum; got ", momenta.size(), " for ", count,
                    " layers");
            own.momentum = momenta[i];
        }
        if (!kept.empty()) {
            of = of_layer("kept tensors", kept, kept_count, i, count);
            const bool last = i + 1 == count;
            if (!(last && layer.is_bare())) require_address("stored", of[0], alignment);
            if (chain.writes(i) && !last) require_address("written", of[1], alignment);
            if (layer.max_pool) require_address("winners", of[2], 1);
            own.stored = pointer<void>(of[0]), own.written = pointer<void>(of[1]);
            own.winners = pointer<std::uint8_t>(of[2]);
        }
        tensors.push_back(own);
    }
    return tensors;
}

void chain_forward_(const Chain& chain, Address input, Address residual, const Addresses& parameters,
                    const Addresses& moving, const std::vector<float>& momenta, const Addresses& kept,
                    Address statistics, Address output, int threads) {
    const std::size_t alignment = element_size(chain.first().dtype);
    require_address("input", input, alignment);
    require_address("output", output, alignment);
    require_address("statistics", statistics, alignof(float));
    require(residual == 0 || chain.takes_residual(), "the last layer adds an input, and has no residual");
    require(residual != 0 || !chain.wants_residual(), "a layer adds what is given; got no residual");
    ChannelValues values(chain, parameter_count + moving_count);
    const auto tensors = layer_tensors(chain, parameters, moving, momenta, kept, values);
    values.fetch();
    chain.forward({pointer<void>(input), pointer<void>(residual), pointer<float>(statistics), pointer<void>(output),
                   tensors.data()},
                  threads);
    values.put_back();
}

void chain_backward_(const Chain& chain, Address grad_output, Address input, Address output,
                     const Addresses& parameters, const Addresses& kept, Address statistics, Address grad_input,
                     Address grad_residual, bool residual_is_input, const Addresses& gradients, bool overwrites_kept,
                     int threads) {
    const std::size_t alignment = element_size(chain.first().dtype), count = chain.layers().size();
    require_address("grad_output", grad_output, alignment);
    require_address("input", input, alignment);
    require_address("statistics", statistics, 4);
    require(!kept.empty(), "what forward kept is needed");
    require(!residual_is_input || grad_residual == 0, "the gradient of a residual that is the input has no place");
    ChannelValues values(chain, 2 * parameter_count);
    const auto tensors = layer_tensors(chain, parameters, {}, {}, kept, values);
    std::vector<LayerGradients> wanted;
    wanted.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
        const Address* const of = of_layer("gradients", gradients, parameter_count, i, count);
        const ChainLayer& layer = chain.layers()[i];
        wanted.push_back({pointer<void>(of[0]), values.of(layer, layer.narrow_values, of[1], ChannelValues::written),
                          values.of(layer, layer.narrow_values, of[2], ChannelValues::written),
                          values.of(layer, layer.narrow_values, of[3], ChannelValues::written)});
    }
    values.fetch();
    chain.backward({pointer<void>(grad_output), pointer<void>(input), pointer<void>(output), pointer<float>(statistics),
                    pointer<void>(grad_input), pointer<void>(grad_residual), residual_is_input, overwrites_kept,
                    tensors.data(), wanted.data()},
                   threads);
    values.put_back();
}

void matrix_product_(std::int64_t rows, std::int64_t columns, std::int64_t depth, Address a,
                     std::array<std::int64_t, 2> a_strides, Address b, std::array<std::int64_t, 2> b_strides,
                     Address bias, Address c, int threads) {
    require(rows > 0 && columns > 0 && depth > 0, "sizes must be positive; got ", rows, "x", columns, ", depth ",
            depth);
    require(a_strides[0] == 1 || a_strides[1] == 1, "a must have a stride of 1; got ", a_strides[0], " and ",
            a_strides[1]);
    require(b_strides[0] == 1 || b_strides[1] == 1, "b must have a stride of 1; got ", b_strides[0], " and ",
            b_strides[1]);
    for (const auto& [name, address] : {std::pair{"a", a}, std::pair{"b", b}, std::pair{"c", c}})
        require_address(name, address, alignof(float));
    matrix_product({pointer<const float>(a), a_strides[0], a_strides[1], pointer<const float>(b), b_strides[0],
                    b_strides[1], pointer<const float>(bias), pointer<float>(c), rows, columns, depth},
                   threads);
}

void settle_pending_gradient_(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups, float eps,
                              float negative_slope, bool activation_first, bool training, Address grad, Address stored,
                              Address weight, Address mean, Address var, Address sum, Address sum_deviation,
                              Address grad_weight, Address grad_bias, int threads) {
    const auto shape = batch_norm_shape(dtype, rows, channels, groups, eps, negative_slope, activation_first);
    require_address("grad", grad, element_size(dtype));
    require_address("stored", stored, element_size(dtype));
    for (Address address : {mean, var, sum, sum_deviation, grad_weight, grad_bias})
        require_address("per-channel values", address, 4);
    settle_pending_gradient(
        {dtype, shape.rows, channels, groups, eps, negative_slope, activation_first, training, pointer<void>(grad),
         pointer<void>(grad), pointer<void>(stored), pointer<float>(weight), pointer<float>(mean), pointer<float>(var),
         pointer<float>(sum), pointer<float>(sum_deviation), pointer<float>(grad_weight), pointer<float>(grad_bias)},
        threads);
}

void channel_sums_(Dtype dtype, std::int64_t rows, std::int64_t channels, Address values, Address sums, int threads) {
    require_cpu_dtype(dtype);
    require_batch_norm_sizes(rows, channels, 1);
    require_address("values", values, element_size(dtype));
    require_address("sums", sums, 4);
    channel_sums({dtype, rows, channels, pointer<void>(values), pointer<float>(sums)}, threads);
}

void convert_(const Addresses& sources, const Addresses& destinations, const std::vector<std::int64_t>& counts,
              Dtype to, int threads) {
    require_cpu_dtype(to);
    require(sources.size() == counts.size() && destinations.size() == counts.size(),
            "sources, destinations and counts must be as many; got ", sources.size(), ", ", destinations.size(),
            " and ", counts.size());
    const Dtype from = to == Dtype::float32 ? Dtype::bfloat16 : Dtype::float32;
    std::vector<Conversion> conversions;
    conversions.reserve(counts.size());
    for (std::size_t i = 0; i < counts.size(); ++i) {
        require(counts[i] >= 1, "counts must be positive; got ", counts[i]);
        require_address("source", sources[i], element_size(from));
        require_address("destination", destinations[i], element_size(to));
        conversions.push_back({pointer<void>(sources[i]), pointer<void>(destinations[i]), counts[i]});
    }
    convert(conversions, to, threads);
}

void transpose_(Dtype dtype, std::int64_t matrices, std::int64_t rows, std::int64_t columns, Address from, Address to,
                int threads) {
    require_cpu_dtype(dtype);
    require(matrices >= 1 && rows >= 1 && columns >= 1, "sizes must be positive; got ", matrices, " of ", rows, "x",
            columns);
    require_address("from", from, element_size(dtype));
    require_address("to", to, element_size(dtype));
    transpose({dtype, matrices, rows, columns, pointer<void>(from), pointer<void>(to)}, threads);
}

void require_max_pool_sizes(const Strides& input_shape, std::int64_t groups) {
    const auto [batch, channels, height, width] = input_shape;
    require(batch >= 1 && channels >= 1 && height >= 2 && width >= 2, "a map of at least 2×2 is pooled; got ", height,
            "×", width, ", batch ", batch, ", channels ", channels);
    require(groups >= 1 && batch % groups == 0, "groups must divide the batch; got ", groups, " groups, batch ", batch);
}

MaxPoolShape max_pool_shape(Dtype dtype, const Strides& input_shape, std::int64_t groups) {
    require_cpu_dtype(dtype);
    require_max_pool_sizes(input_shape, groups);
    const auto [batch, channels, height, width] = input_shape;
    return {dtype, batch, height, width, channels, groups};
}

void max_pool_forward_(Dtype dtype, const Strides& input_shape, std::int64_t groups, Address input, Address scale,
                       Address shift, float negative_slope, bool activation_first, Address output, Address index,
                       int threads) {
    const auto shape = max_pool_shape(dtype, input_shape, groups);
    for (Address address : {input, output}) require_address("pixels", address, element_size(dtype));
    for (Address address : {scale, shift}) require_address("scale and shift", address, 4);
    require_address("index", index, 1);
    max_pool_forward(
        {shape,
         {pointer<void>(input), pointer<float>(scale), pointer<float>(shift), negative_slope, activation_first},
         pointer<void>(output),
         pointer<std::uint8_t>(index)},
        threads);
}

void max_pool_backward_(Dtype dtype, const Strides& input_shape, std::int64_t groups, Address input, Address scale,
                        Address shift, float negative_slope, bool activation_first, Address grad_output, Address index,
                        bool training, float eps, Address weight, Address mean, Address var, Address grad_input,
                        Address grad_weight, Address grad_bias, int threads) {
    const auto shape = max_pool_shape(dtype, input_shape, groups);
    for (Address address : {input, grad_output, grad_input}) require_address("pixels", address, element_size(dtype));
    for (Address address : {scale, shift, mean, var, grad_weight, grad_bias})
        require_address("per-channel values", address, 4);
    require_address("index", index, 1);
    max_pool_backward(
        {shape,
         {pointer<void>(input), pointer<float>(scale), pointer<float>(shift), negative_slope, activation_first},
         pointer<void>(grad_output),
         pointer<std::uint8_t>(index),
         training,
         eps,
         pointer<float>(weight),
         pointer<float>(mean),
         pointer<float>(var),
         pointer<void>(grad_input),
         pointer<float>(grad_weight),
         pointer<float>(grad_bias)},
        threads);
}

void require_discriminator_logits(Dtype dtype, GanLoss kind, Address real, std::int64_t real_count, Address fake,
                                  std::int64_t fake_count, Address grad_real, Address grad_fake) {
    require(real_count >= 1 && fake_count >= 1, "at least one logit of each; got ", real_count, " real and ",
            fake_count, " fake");
    require(kind != GanLoss::relativistic || real_count == fake_count, "the relativistic loss pairs logits; got ",
            real_count, " real and ", fake_count, " fake");
    for (Address address : {real, fake, grad_real, grad_fake})
        require_address("logits and gradients", address, element_size(dtype));
}

void require_generator_logits(Dtype dtype, GanLoss kind, Address fake, Address real, std::int64_t count,
                              Address grad_fake, Address grad_real) {
    require(count >= 1, "at least one logit; got ", count);
    require_address("fake", fake, element_size(dtype));
    require_address("grad_fake", grad_fake, element_size(dtype));
    if (kind == GanLoss::relativistic) {
        require_address("real", real, element_size(dtype));
        require_address("grad_real", grad_real, element_size(dtype));
    }
}

void discriminator_loss_(Dtype dtype, GanLoss kind, float label_smoothing, Address real, std::int64_t real_count,
                         Address fake, std::int64_t fake_count, Address grad_real, Address grad_fake, Address loss,
                         Address metrics, int threads) {
    require_cpu_dtype(dtype);
    require_discriminator_logits(dtype, kind, real, real_count, fake, fake_count, grad_real, grad_fake);
    require_address("loss", loss, 4);
    require_address("metrics", metrics, 4);
    discriminator_loss(
        {dtype, kind, label_smoothing, pointer<void>(real), pointer<void>(fake), real_count, fake_count,
         pointer<void>(grad_real), pointer<void>(grad_fake), pointer<float>(loss), pointer<float>(metrics)},
        threads);
}

void generator_loss_(Dtype dtype, GanLoss kind, Address fake, Address real, std::int64_t count, Address grad_fake,
                     Address grad_real, Address loss, int threads) {
    require_cpu_dtype(dtype);
    require_generator_logits(dtype, kind, fake, real, count, grad_fake, grad_real);
    require_address("loss", loss, 4);
    generator_loss({dtype, kind, pointer<void>(fake), pointer<void>(real), count, pointer<void>(grad_fake),
                    pointer<void>(grad_real), pointer<float>(loss)},
                   threads);
}

std::size_t bytes_held() {
    return workspace_bytes_held() + kept_weight_bytes();
}

std::unique_ptr<Workspace> tensor_memory(std::int64_t bytes) {
    require(bytes >= 1, "memory has at least one byte; got ", bytes);
    return std::make_unique<Workspace>(static_cast<std::size_t>(bytes), Workspace::tensor);
}

std::size_t release_memory() {
    const std::size_t bytes = bytes_held();
    release_workspace();
    release_kept_weights();
    return bytes;
}

#if GANVAS_WITH_CUDA
void discriminator_loss_cuda_(Dtype dtype, GanLoss kind, float label_smoothing, Address real, std::int64_t real_count,
                              Address fake, std::int64_t fake_count, Address grad_real, Address grad_fake, Address loss,
                              Address metrics, Address workspace, int device, Address stream) {
    require_discriminator_logits(dtype, kind, real, real_count, fake, fake_count, grad_real, grad_fake);
    require_address("loss", loss, element_size(dtype));
    require_address("metrics", metrics, 4);
    require_address("workspace", workspace, 8);
    cuda::discriminator_loss({dtype, kind, label_smoothing, pointer<void>(real), pointer<void>(fake), real_count,
                              fake_count, pointer<void>(grad_real), pointer<void>(grad_fake), pointer<void>(loss),
                              pointer<float>(metrics), pointer<void>(workspace)},
                             {device, pointer<void>(stream)});
}

void generator_loss_cuda_(Dtype dtype, GanLoss kind, Address fake, Address real, std::int64_t count, Address grad_fake,
                          Address grad_real, Address loss, Address workspace, int device, Address stream) {
    require_generator_logits(dtype, kind, fake, real, count, grad_fake, grad_real);
    require_address("loss", loss, element_size(dtype));
    require_address("workspace", workspace, 8);
    cuda::generator_loss({dtype, kind, pointer<void>(fake), pointer<void>(real), count, pointer<void>(grad_fake),
                          pointer<void>(grad_real), pointer<void>(loss), pointer<void>(workspace)},
                         {device, pointer<void>(stream)});
}

void require_workspace(Address workspace, std::int64_t bytes, std::int64_t floats) {
    if (floats == 0) return;
    require_address("workspace", workspace, 4);
    require(bytes >= 4 * floats, "workspace must hold ", 4 * floats, " bytes; got ", bytes);
}

cuda::BatchNormShape batch_norm_shape_cuda(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                           float eps, float negative_slope, bool activation_first) {
    require_batch_norm_sizes(rows, channels, groups);
    return {dtype, rows, channels, groups, eps, negative_slope, activation_first};
}

std::int64_t batch_norm_workspace_cuda_(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                        int device) {
    const auto shape = batch_norm_shape_cuda(dtype, rows, channels, groups, 0.0f, 1.0f, false);
    return 4 * cuda::batch_norm_workspace_floats(shape, device);
}

void batch_norm_leaky_relu_forward_cuda_(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                         float eps, float negative_slope, bool activation_first, bool training,
                                         Address input, Address weight, Address bias, Address mean, Address var,
                                         Address running_mean, Address running_var, float momentum, Address residual,
                                         Address output, Address workspace, std::int64_t workspace_bytes, int device,
                                         Address stream) {
    const auto shape = batch_norm_shape_cuda(dtype, rows, channels, groups, eps, negative_slope, activation_first);
    for (Address address : {input, output}) require_address("input and output", address, element_size(dtype));
    for (Address address : {mean, var}) require_address("mean and var", address, 4);
    require((running_mean == 0) == (running_var == 0), "running_mean and running_var go together");
    require(residual == 0 || !activation_first, "a residual is added before the activation, not after it");
    require(residual % element_size(dtype) == 0, "residual must be aligned to ", element_size(dtype),
            " bytes; got address ", residual);
    if (training) require_workspace(workspace, workspace_bytes, cuda::batch_norm_workspace_floats(shape, device));
    cuda::batch_norm_leaky_relu_forward(
        {shape, pointer<void>(input), pointer<float>(weight), pointer<float>(bias), training, pointer<float>(mean),
         pointer<float>(var), pointer<float>(running_mean), pointer<float>(running_var), momentum,
         pointer<void>(residual), pointer<void>(output), pointer<float>(workspace)},
        {device, pointer<void>(stream)});
}

std::int64_t batch_statistics_workspace_cuda_(Dtype dtype, std::int64_t rows, std::int64_t channels,
                                              std::int64_t groups, int device) {
    const auto shape = batch_norm_shape_cuda(dtype, rows, channels, groups, 0.0f, 1.0f, false);
    return 4 * cuda::batch_statistics_workspace_floats(shape, device);
}

void batch_statistics_cuda_(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups, float eps,
                            float negative_slope, bool activation_first, Address input, Address weight, Address bias,
                            Address running_mean, Address running_var, float momentum, Address mean, Address var,
                            Address scale, Address shift, Address workspace, std::int64_t workspace_bytes, int device,
                            Address stream) {
    const auto shape = batch_norm_shape_cuda(dtype, rows, channels, groups, eps, negative_slope, activation_first);
    require_address("input", input, element_size(dtype));
    for (Address address : {mean, var, scale, shift}) require_address("statistics", address, 4);
    require((running_mean == 0) == (running_var == 0), "running_mean and running_var go together");
    require_workspace(workspace, workspace_bytes, cuda::batch_statistics_workspace_floats(shape, device));
    cuda::batch_statistics(
        {shape, pointer<void>(input), pointer<float>(weight), pointer<float>(bias), pointer<float>(running_mean),
         pointer<float>(running_var), momentum, pointer<float>(mean), pointer<float>(var), pointer<float>(scale),
         pointer<float>(shift), pointer<float>(workspace)},
        {device, pointer<void>(stream)});
}

void batch_norm_leaky_relu_backward_cuda_(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                          float eps, float negative_slope, bool activation_first, bool training,
                                          Address grad_output, Address output, Address input, Address weight,
                                          Address bias, Address mean, Address var, Address grad_input,
                                          Address grad_weight, Address grad_bias, Address grad_residual,
                                          Address workspace, std::int64_t workspace_bytes, int device, Address stream) {
    const auto shape = batch_norm_shape_cuda(dtype, rows, channels, groups, eps, negative_slope, activation_first);
    for (Address address : {grad_output, input, grad_input})
        require_address("input and gradients", address, element_size(dtype));
    for (Address address : {mean, var, grad_weight, grad_bias}) require_address("per-channel values", address, 4);
    require((output == 0) == (grad_residual == 0), "output and grad_residual go together");
    if (grad_residual != 0) {
        require(!activation_first, "a residual is added before the activation, not after it");
        require(negative_slope >= 0, "a slope below 0 leaves no trace of the kink's side in the output; got ",
                std::to_string(negative_slope));
        for (Address address : {output, grad_residual})
            require_address("output and grad_residual", address, element_size(dtype));
    }
    require_workspace(workspace, workspace_bytes, cuda::batch_norm_workspace_floats(shape, device));
    cuda::batch_norm_leaky_relu_backward(
        {shape, pointer<void>(grad_output), pointer<void>(input), pointer<float>(weight), pointer<float>(bias),
         pointer<float>(mean), pointer<float>(var), training, pointer<void>(grad_input), pointer<float>(grad_weight),
         pointer<float>(grad_bias), pointer<void>(output), pointer<void>(grad_residual), pointer<float>(workspace)},
        {device, pointer<void>(stream)});
}

void settle_pending_gradient_cuda_(Dtype dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                   float eps, float negative_slope, bool activation_first, bool training, Address grad,
                                   Address stored, Address weight, Address mean, Address var, Address sums,
                                   Address grad_weight, Address grad_bias, int device, Address stream) {
    const auto shape = batch_norm_shape_cuda(dtype, rows, channels, groups, eps, negative_slope, activation_first);
    for (Address address : {grad, stored}) require_address("grad and stored", address, element_size(dtype));
    for (Address address : {mean, var, sums, grad_weight, grad_bias}) require_address("per-channel values", address, 4);
    cuda::settle_pending_gradient(
        {shape, training, pointer<void>(grad), pointer<void>(stored), pointer<float>(weight), pointer<float>(mean),
         pointer<float>(var), pointer<float>(sums), pointer<float>(grad_weight), pointer<float>(grad_bias)},
        {device, pointer<void>(stream)});
}

std::int64_t finish_statistics_workspace_cuda_(std::int64_t groups, std::int64_t tiles, std::int64_t channels) {
    require(groups >= 1 && tiles >= 1 && channels >= 1, "groups, tiles and channels must be at least 1; got ", groups,
            ", ", tiles, " and ", channels);
    return 4 * cuda::finish_workspace_floats(groups, tiles, channels);
}

void finish_statistics_cuda_(std::int64_t groups, std::int64_t tiles, std::int64_t channels, Address counts,
                             Address means, Address deviations, Address weight, Address bias, float eps,
                             Address running_mean, Address running_var, float momentum, Address mean, Address var,
                             Address scale, Address shift, Address workspace, std::int64_t workspace_bytes, int device,
                             Address stream) {
    require_workspace(workspace, workspace_bytes, finish_statistics_workspace_cuda_(groups, tiles, channels) / 4);
    for (Address address : {counts, means, deviations, mean, var, scale, shift})
        require_address("statistics", address, 4);
    require((running_mean == 0) == (running_var == 0), "running_mean and running_var go together");
    cuda::finish_statistics(
        {groups, tiles, channels, pointer<float>(counts), pointer<float>(means), pointer<float>(deviations),
         pointer<float>(weight), pointer<float>(bias), eps, pointer<float>(running_mean), pointer<float>(running_var),
         momentum, pointer<float>(mean), pointer<float>(var), pointer<float>(scale), pointer<float>(shift),
         pointer<float>(workspace)},
        {device, pointer<void>(stream)});
}

cuda::MaxPoolInput max_pool_input_cuda(Dtype dtype, const Strides& shape, std::int64_t groups, Address stored,
                                       Address weight, Address bias, Address mean, Address var, float eps,
                                       float negative_slope, bool activation_first) {
    require_max_pool_sizes(shape, groups);
    require_address("input", stored, element_size(dtype));
    for (Address address : {mean, var}) require_address("mean and var", address, 4);
    return {dtype,
            shape[0],
            shape[2],
            shape[3],
            shape[1],
            groups,
            pointer<void>(stored),
            pointer<float>(weight),
            pointer<float>(bias),
            pointer<float>(mean),
            pointer<float>(var),
            eps,
            negative_slope,
            activation_first};
}

std::int64_t max_pool_workspace_cuda_(Dtype dtype, const Strides& shape, std::int64_t groups, int device) {
    require_max_pool_sizes(shape, groups);
    cuda::MaxPoolInput input{};
    input.dtype = dtype, input.batch = shape[0], input.height = shape[2], input.width = shape[3];
    input.channels = shape[1], input.groups = groups;
    return 4 * cuda::max_pool_workspace_floats(input, device);
}

void max_pool_forward_cuda_(Dtype dtype, const Strides& input_shape, std::int64_t groups, Address input, Address weight,
                            Address bias, Address mean, Address var, float eps, float negative_slope,
                            bool activation_first, Address output, Address index, int device, Address stream) {
    const auto pending = max_pool_input_cuda(dtype, input_shape, groups, input, weight, bias, mean, var, eps,
                                             negative_slope, activation_first);
    require_address("output", output, element_size(dtype));
    require_address("index", index, 1);
    cuda::max_pool_forward({pending, pointer<void>(output), pointer<std::uint8_t>(index)},
                           {device, pointer<void>(stream)});
}

void max_pool_backward_cuda_(Dtype dtype, const Strides& input_shape, std::int64_t groups, Address input,
                             Address weight, Address bias, Address mean, Address var, float eps, float negative_slope,
                             bool activation_first, Address grad_output, Address index, bool training,
                             Address grad_input, Address grad_weight, Address grad_bias, Address workspace,
                             std::int64_t workspace_bytes, int device, Address stream) {
    const auto pending = max_pool_input_cuda(dtype, input_shape, groups, input, weight, bias, mean, var, eps,
                                             negative_slope, activation_first);
    for (Address address : {grad_output, grad_input}) require_address("gradients", address, element_size(dtype));
    for (Address address : {grad_weight, grad_bias}) require_address("per-channel values", address, 4);
    require_address("index", index, 1);
    require_workspace(workspace, workspace_bytes, cuda::max_pool_workspace_floats(pending, device));
    cuda::max_pool_backward(
        {pending, pointer<void>(grad_output), pointer<std::uint8_t>(index), training, pointer<void>(grad_input),
         pointer<float>(grad_weight), pointer<float>(grad_bias), pointer<float>(workspace)},
        {device, pointer<void>(stream)});
}
#endif

py::dict build_info() {
    py::dict info;
    info["version"] = GANVAS_VERSION;
    info["compiler"] = GANVAS_COMPILER;
    std::vector<std::string> isas;
#define NAME(isa) isas.push_back(#isa);
    GANVAS_FOR_EACH_ISA(NAME)
#undef NAME
    py::list names;
    for (const auto& name : isas) names.append(name);
#if defined(__x86_64__)
    names.append(isa_name(Isa::amx));
#endif
    info["cpu_isas"] = names;
    info["cuda"] = GANVAS_CUDA_ARCHITECTURES;
    return info;
}

template <class Enum>
void add_enumeration(py::module_& module, const char* name, const std::vector<std::pair<const char*, Enum>>& members) {
    py::list numbered;
    for (const auto& [member, value] : members) numbered.append(py::make_tuple(member, static_cast<int>(value)));
    module.attr(name) =
        py::module_::import("enum").attr("IntEnum")(name, numbered, py::arg("module") = module.attr("__name__"));
}

}  // namespace

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
    module.doc() = "ganvas' native kernels: addresses, sizes and a thread count in, filled memory out";
    add_enumeration<Dtype>(module, "Dtype",
                           {{"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16}, {"float16", Dtype::float16}});
    add_enumeration<GanLoss>(module, "GanLoss",
                             {{"bce", GanLoss::bce},
                              {"non_saturating", GanLoss::non_saturating},
                              {"lsgan", GanLoss::lsgan},
                              {"hinge", GanLoss::hinge},
                              {"wgan", GanLoss::wgan},
                              {"relativistic", GanLoss::relativistic}});
    add_enumeration<ConvolutionKind>(module, "ConvolutionKind",
                                     {{"direct", ConvolutionKind::direct},
                                      {"conv3x3", ConvolutionKind::conv3x3},
                                      {"conv4x4", ConvolutionKind::conv4x4},
                                      {"conv_transpose4x4", ConvolutionKind::conv_transpose4x4},
                                      {"conv3x3_even", ConvolutionKind::conv3x3_even},
                                      {"conv3x3_odd", ConvolutionKind::conv3x3_odd},
                                      {"conv3x3_avg_pool2", ConvolutionKind::conv3x3_avg_pool2},
                                      {"upsample2_conv3x3", ConvolutionKind::upsample2_conv3x3}});
    add_enumeration<Norm>(module, "Norm", {{"none", Norm::none}, {"fixed", Norm::fixed}, {"batch", Norm::batch}});
    const auto without_gil = py::call_guard<py::gil_scoped_release>();
    module.def("batch_norm_coefficients", batch_norm_coefficients_, without_gil);
    module.def("batch_norm_leaky_relu_forward", batch_norm_leaky_relu_forward_, without_gil);
    module.def("batch_norm_leaky_relu_backward", batch_norm_leaky_relu_backward_, without_gil);
    module.def("batch_norm_add_leaky_relu_forward", batch_norm_add_leaky_relu_forward_, without_gil);
    module.def("batch_norm_add_leaky_relu_backward", batch_norm_add_leaky_relu_backward_, without_gil);
    py::class_<Convolution, std::shared_ptr<Convolution>>(module, "Convolution", "a convolution of inputs of one shape")
        .def(py::init(&make_convolution))
        .def_static("direct", &make_direct_convolution)
        .def_property_readonly("output_shape",
                               [](const Convolution& c) {
                                   const ConvolutionShape& s = c.shape;
                                   return py::make_tuple(s.batch, s.out_channels, s.out_height, s.out_width);
                               })
        .def("forward", convolution_forward_, without_gil)
        .def("forward_statistics", convolution_forward_statistics_, without_gil)
        .def("backward_input", convolution_backward_input_, without_gil)
        .def("backward_weight", convolution_backward_weight_, without_gil);
    py::class_<Chain>(module, "Chain", "layers in one call, of inputs of one shape")
        .def(py::init(&make_chain))
        .def_property_readonly("statistics_floats", &Chain::statistics_floats)
        .def("forward", chain_forward_, without_gil)
        .def("backward", chain_backward_, without_gil);
    module.def("channel_sums", channel_sums_, without_gil);
    module.def("convert", convert_, without_gil, "float32 to bfloat16 or back");
    module.def("max_pool_forward", max_pool_forward_, without_gil);
    module.def("max_pool_backward", max_pool_backward_, without_gil);
    module.def("matrix_product", matrix_product_, without_gil);
    module.def("settle_pending_gradient", settle_pending_gradient_, without_gil);
    module.def("transpose", transpose_, without_gil, "each matrix (rows, columns) to (columns, rows)");
    module.def("discriminator_loss", discriminator_loss_, without_gil);
    module.def("generator_loss", generator_loss_, without_gil);
    py::class_<Workspace>(module, "Memory", py::buffer_protocol(),
                          "uninitialised bytes for a tensor, from the memory that is kept for later calls")
        .def(py::init(&tensor_memory))
        .def_buffer([](const Workspace& memory) {
            return py::buffer_info(memory.begin(), 1, py::format_descriptor<std::uint8_t>::format(), 1,
                                   {memory.bytes()}, {1});
        });
    module.def("workspace_bytes_held", bytes_held,
               "memory kept for later calls: scratch, and weights as kernels multiply by them");
    module.def("release_workspace", release_memory, without_gil,
               "gives that memory back to the system; the number of bytes");
#if GANVAS_WITH_CUDA
    module.def("batch_norm_workspace_cuda", batch_norm_workspace_cuda_);
    module.def("batch_norm_leaky_relu_forward_cuda", batch_norm_leaky_relu_forward_cuda_, without_gil);
    module.def("batch_statistics_workspace_cuda", batch_statistics_workspace_cuda_);
    module.def("batch_statistics_cuda", batch_statistics_cuda_, without_gil);
    module.def("batch_norm_leaky_relu_backward_cuda", batch_norm_leaky_relu_backward_cuda_, without_gil);
    module.def("settle_pending_gradient_cuda", settle_pending_gradient_cuda_, without_gil);
    module.def("finish_statistics_workspace_cuda", finish_statistics_workspace_cuda_);
    module.def("finish_statistics_cuda", finish_statistics_cuda_, without_gil);
    module.def("max_pool_workspace_cuda", max_pool_workspace_cuda_);
    module.def("max_pool_forward_cuda", max_pool_forward_cuda_, without_gil);
    module.def("max_pool_backward_cuda", max_pool_backward_cuda_, without_gil);
    module.def("discriminator_loss_cuda", discriminator_loss_cuda_, without_gil);
    module.def("generator_loss_cuda", generator_loss_cuda_, without_gil);
    module.def("cuda_refusal", cuda::refusal, without_gil,
               "why the CUDA kernels cannot run on the device of this number; empty if they can");
    module.attr("GAN_LOSS_WORKSPACE_BYTES") = cuda::gan_loss_workspace_bytes;
#endif
    module.def("build_info", build_info,
               "version, compiler, cpu_isas and cuda architectures this module was built with");
    module.def(
        "environment_variable", [](const char* name) { return std::getenv(name); },
        "its value, None where it is not set");
    module.def("selected_isa", [] { return isa_name(selected_isa()); }, "the instruction set the CPU kernels use here");
    module.def("has_bfloat16_tiles", &has_bfloat16_tiles,
               "whether coarse products of convolutions are of tiles of bfloat16 numbers (AMX)");
}

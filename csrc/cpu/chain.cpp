#include "chain.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "../require.h"
#include "batch_norm_leaky_relu.h"
#include "channel_sums.h"
#include "conversion.h"
#include "max_pool.h"
#include "parallel.h"
#include "pending_gradient.h"
#include "workspace.h"

namespace ganvas::cpu {
namespace {

std::int64_t rows_of(const ConvolutionShape& s) {
    return s.batch * s.out_height * s.out_width;
}

std::int64_t stored_bytes(const ChainLayer& layer) {
    return output_bytes(layer.shape());
}

std::int64_t pooled_pixels(const ChainLayer& layer) {
    const ConvolutionShape& s = layer.shape();
    return s.batch * (s.out_height / 2) * (s.out_width / 2) * s.out_channels;
}

// Of what a layer hands the next.
std::int64_t output_bytes(const ChainLayer& layer) {
    return layer.max_pool ? pooled_pixels(layer) * element_bytes(layer.shape().dtype) : stored_bytes(layer);
}

void require_fit(const ChainLayer& before, const ChainLayer& layer) {
    const ConvolutionShape &a = before.shape(), &b = layer.shape();
    const std::int64_t divisor = before.max_pool ? 2 : 1;
    const std::int64_t height = a.out_height / divisor, width = a.out_width / divisor;
    require(a.dtype == b.dtype && a.batch == b.batch && a.out_channels == b.in_channels && height == b.height &&
                width == b.width,
            "each layer reads what the one before puts out; got a layer of ", b.batch, "×", b.in_channels, "×",
            b.height, "×", b.width, " after one that puts out ", a.batch, "×", a.out_channels, "×", height, "×", width);
}

// The layer at `position` can add what it names.
void require_addition(const std::vector<ChainLayer>& layers, std::size_t position) {
    const ChainLayer& layer = layers[position];
    require(layer.norm != Norm::none && !layer.activation_first && !layer.max_pool,
            "what a layer adds comes after its norm, before or after its activation, and it does not pool");
    if (layer.adds == ChainLayer::given) return;
    require(layer.adds >= 0 && layer.adds <= static_cast<std::int64_t>(position), "layer ", position,
            " adds the input of one that comes before, or its own; got ", layer.adds);
    const auto source = static_cast<std::size_t>(layer.adds);
    const ConvolutionShape &read = layers[source].shape(), &added = layer.shape();
    require(read.in_channels == added.out_channels && read.height == added.out_height && read.width == added.out_width,
            "what a layer adds is like its output; got ", read.in_channels, "×", read.height, "×", read.width, " for ",
            added.out_channels, "×", added.out_height, "×", added.out_width);
    require(source == 0 || !layers[source - 1].is_bare(), "what a layer adds is an activation, or the chain's input");
}

// A layer in a call: what it is, its tensors, and its statistics [G, C].
template <class Float>
struct Stage {
    const ChainLayer& layer;
    const LayerTensors& tensors;
    std::int64_t groups;
    Float *mean, *var, *scale, *shift;

    std::int64_t channels() const { return layer.shape().out_channels; }
    // What the convolution's raw output stands for.
    PendingActivation pending(const void* stored) const {
        return {stored, scale, shift, layer.negative_slope, layer.activation_first};
    }
    BatchNormShape norm_shape() const {
        const ConvolutionShape& s = layer.shape();
        return {s.dtype, rows_of(s), s.out_channels, groups, eps(), layer.negative_slope, layer.activation_first};
    }
    MaxPoolShape pool_shape() const {
        const ConvolutionShape& s = layer.shape();
        return {s.dtype, s.batch, s.out_height, s.out_width, s.out_channels, groups};
    }
    // Without a norm variance is 1, and nothing may be added to it.
    float eps() const { return layer.norm == Norm::none ? 0.0f : layer.eps; }
    ConvolutionWeight laid_out(const void* values) const {
        const auto& strides = layer.weight_strides;
        return {static_cast<const float*>(values), strides[0], strides[1], strides[2], strides[3]};
    }
    // The weight as kernels read it: `copy` has room for one of bfloat16 in float32.
    ConvolutionWeight weight(float* copy, int threads) const {
        if (!layer.narrow_weight) return laid_out(tensors.weight);
        convert({{tensors.weight, copy, layer.narrow_weight}}, Dtype::float32, threads);
        return laid_out(copy);
    }
};

// Calls take(stage) for each layer in order.
template <class Float, class Take>
void for_each_stage(const std::vector<ChainLayer>& layers, const LayerTensors* tensors, std::int64_t groups,
                    Float* statistics, Take take) {
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const std::int64_t row = groups * layers[i].shape().out_channels;
        take(Stage<Float>{layers[i], tensors[i], groups, statistics, statistics + row, statistics + 2 * row,
                          statistics + 3 * row});
        statistics += 4 * row;
    }
}

// Statistics that are given, or those that leave values as they are, and the coefficients they make.
void set_fixed_statistics(const Stage<float>& stage) {
    const std::int64_t channels = stage.channels();
    const bool given = stage.layer.norm == Norm::fixed;
    for (std::int64_t group = 0; group < stage.groups; ++group) {
        float *const mean = stage.mean + group * channels, *const var = stage.var + group * channels;
        for (std::int64_t c = 0; c < channels; ++c) {
            mean[c] = given ? stage.tensors.running_mean[c] : 0.0f;
            var[c] = given ? stage.tensors.running_var[c] : 1.0f;
        }
    }
    batch_norm_coefficients({channels, stage.groups, stage.eps(), stage.tensors.bn_weight, stage.tensors.bn_bias,
                             stage.mean, stage.var, stage.scale, stage.shift});
}

// Memory for pixels that do not outlast a call: as many blocks as are in use at a time.
class PixelMemory {
  public:
    struct Block {
        void* begin;
        std::int64_t bytes;  // 0: the caller's, into which nothing else goes
    };

    // Each block of its own is of `largest` bytes.
    explicit PixelMemory(std::int64_t largest) : largest_(largest) {}
    // The block that was given last, which the cache may still hold, of those that are large enough.
    Block take(std::int64_t bytes) {
        for (auto block = free_.rbegin(); block != free_.rend(); ++block)
            if (block->bytes >= bytes) {
                const Block found = *block;
                free_.erase(std::next(block).base());
                return found;
            }
        const auto count = static_cast<std::size_t>(largest_);
        return {own_.emplace_back(Workspace::padded(count)).take(count), largest_};
    }
    // A block, or null, that is not read any more.
    void give(Block block) {
        if (block.begin) free_.push_back(block);
    }

  private:
    std::int64_t largest_;
    std::vector<Block> free_;
    std::deque<Workspace> own_;
};

// Memory for float32 numbers.
class Floats {
  public:
    explicit Floats(std::int64_t count)
        : workspace_(Workspace::padded(static_cast<std::size_t>(count) * sizeof(float))),
          first_(static_cast<float*>(workspace_.take(static_cast<std::size_t>(count) * sizeof(float)))) {}
    float* first() const { return first_; }

  private:
    Workspace workspace_;
    float* first_;
};

// The most numbers that a weight of bfloat16 has.
std::int64_t largest_narrow_weight(const std::vector<ChainLayer>& layers) {
    std::int64_t largest = 0;
    for (const ChainLayer& layer : layers) largest = std::max(largest, layer.narrow_weight);
    return largest;
}

// Whether a layer's activation is written at once, where no backward pass follows.
bool can_activate(const ChainLayer& layer) {
    return layer.norm != Norm::batch && !layer.max_pool && !layer.is_bare();
}

// How many images a layer convolves and pools at a time, where nothing is kept but the pooled ones: what it stores of
// them, in the cores' own caches.
std::int64_t images_at_a_time(const ChainLayer& layer, int threads) {
    const std::int64_t batch = layer.shape().batch;
    const std::int64_t fitting = threads * core_cache_bytes() / 4 * batch / stored_bytes(layer);
    const std::int64_t times = batch / std::clamp<std::int64_t>(fitting, std::min<std::int64_t>(threads, batch), batch);
    return (batch + times - 1) / times;
}

// For what layers leave for the next one.
PixelMemory forward_memory(const std::vector<ChainLayer>& layers) {
    std::int64_t largest = 0;
    for (const ChainLayer& layer : layers) {
        if (&layer == &layers.back() && (layer.is_bare() || can_activate(layer))) break;  // it is the output
        largest = std::max(largest, stored_bytes(layer));
    }
    return PixelMemory(largest);
}

}  // namespace

Chain::Chain(std::vector<ChainLayer> layers, std::int64_t groups) : layers_(std::move(layers)), groups_(groups) {
    require(!layers_.empty(), "a chain has at least one layer; got none");
    for (ChainLayer& layer : layers_) {
        require(layer.forward != nullptr, "every layer has a convolution forward");
        if (layer.norm == Norm::none) layer.activation_first = false;  // there is nothing that it could come before
    }
    for (std::size_t i = 1; i < layers_.size(); ++i) require_fit(layers_[i - 1], layers_[i]);
    adder_.assign(layers_.size() + 1, -1);
    residual_layer_ = layers_.size() - 1;
    int givens = 0;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        if (layers_[i].adds == ChainLayer::nothing) continue;
        require_addition(layers_, i);
        if (layers_[i].adds == ChainLayer::given) {
            require(++givens == 1, "what is given is added once; got layers ", residual_layer_, " and ", i);
            residual_layer_ = i;
            continue;
        }
        std::int64_t& adder = adder_[static_cast<std::size_t>(layers_[i].adds)];
        require(adder == -1, "an input is added once; got layers ", adder, " and ", i);
        adder = static_cast<std::int64_t>(i);
    }
    require(groups >= 1 && first().batch % groups == 0, "groups must divide the batch of ", first().batch, "; got ",
            groups);
}

std::int64_t Chain::statistics_floats() const {
    std::int64_t count = 0;
    for (const ChainLayer& layer : layers_) count += 4 * groups_ * layer.shape().out_channels;
    return count;
}

bool Chain::gradient_has_sums(std::size_t i) const {
    const ChainLayer& layer = layers_[i];
    if (i + 1 == layers_.size() || layer.max_pool) return false;
    // What was written has the kink's side, unless something was added to that.
    return !writes(i) || (!layer.activation_first && layer.negative_slope >= 0 && !layer.adds_last);
}

void Chain::forward(const ChainForward& call, int threads) const {
    const bool kept = call.layers[0].stored != nullptr;
    PixelMemory memory = forward_memory(layers_);
    const auto place = [&](void* given, std::int64_t bytes) {
        return given ? PixelMemory::Block{given, 0} : memory.take(bytes);
    };
    std::vector<PixelMemory::Block> inputs(layers_.size());  // of the layers after the first
    const Floats weight_copy(largest_narrow_weight(layers_));

    PendingActivation before{call.input, nullptr, nullptr, 1.0f, false};
    for_each_stage(layers_, call.layers, groups_, call.statistics, [&](Stage<float> stage) {
        const ChainLayer& layer = stage.layer;
        const LayerTensors& tensors = stage.tensors;
        const auto i = static_cast<std::size_t>(&layer - layers_.data());
        const bool last = &layer == &layers_.back();
        const void* residual = i == residual_layer_ ? call.residual : nullptr;
        if (layer.adds >= 0)
            residual = layer.adds == 0 ? call.input : inputs[static_cast<std::size_t>(layer.adds)].begin;
        const bool is_output = last && layer.is_bare();
        const bool activates = !kept && can_activate(layer);
        PixelMemory::Block result =
            place(last && (is_output || activates) ? call.output : tensors.stored, stored_bytes(layer));
        void* const output = result.begin;
        ConvolutionForward args{};
        // Groups are told apart where the input or the output has statistics of each.
        args.shape = layer.forward->grouped(before.scale || layer.norm == Norm::batch ? groups_ : 1);
        args.input = before;
        args.weight = stage.weight(weight_copy.first(), threads);
        args.bias = tensors.bias;
        args.output = output;
        args.evaluates = !kept && layer.norm != Norm::batch;
        if (layer.norm == Norm::batch) {
            args.statistics = {tensors.bn_weight,
                               tensors.bn_bias,
                               layer.eps,
                               layer.activation_first,
                               layer.negative_slope,
                               tensors.running_mean,
                               tensors.running_var,
                               tensors.momentum,
                               stage.mean,
                               stage.var,
                               stage.scale,
                               stage.shift};
            if (tensors.batches) *tensors.batches += groups_;
        } else {
            set_fixed_statistics(stage);
            if (activates) args.activation = stage.pending(residual);
            args.adds_last = layer.adds_last;
        }
        PixelMemory::Block written{};  // what the next layer reads, where that is not pending
        if (layer.max_pool) {
            written = place(last ? call.output : tensors.written, output_bytes(layer));
            const std::int64_t batch = args.shape.batch, read = input_bytes(layer.shape()) / batch;
            const std::int64_t images = args.evaluates && groups_ == 1 ? images_at_a_time(layer, threads) : batch;
            MaxPoolForward pool{stage.pool_shape(), stage.pending(output), written.begin, tensors.winners};
            for (std::int64_t first = 0; first < batch; first += images) {
                args.shape.batch = pool.shape.batch = std::min(images, batch - first);
                args.input.stored = static_cast<const char*>(before.stored) + first * read;
                pool.output = static_cast<char*>(written.begin) + first * (output_bytes(layer) / batch);
                layer.forward->forward(args, threads);
                max_pool_forward(pool, threads);
            }
        } else {
            layer.forward->forward(args, threads);
        }
        if (adder_[i] < 0) memory.give(inputs[i]);
        before = activates ? PendingActivation{output, nullptr, nullptr, 1.0f, false} : stage.pending(output);
        if (!layer.max_pool && (last || writes(i)) && !is_output && !activates) {
            written = place(last ? call.output : tensors.written, output_bytes(layer));
            batch_norm_leaky_relu_forward(
                {stage.norm_shape(), output, tensors.bn_weight, tensors.bn_bias, false, stage.mean, stage.var, nullptr,
                 nullptr, 0.0f, residual, layer.adds_last, written.begin},
                threads);
        }
        if (written.begin) {
            before = {written.begin, nullptr, nullptr, 1.0f, false};
            memory.give(result);
            result = written;
        }
        if (layer.adds > 0) memory.give(inputs[static_cast<std::size_t>(layer.adds)]);
        if (!last) inputs[i + 1] = result;
    });
}

void Chain::backward(const ChainBackward& call, int threads) const {
    const auto count = layers_.size();
    std::size_t first = 0;
    if (!call.grad_input)
        while (first + 1 < count && !call.gradients[first].any()) ++first;
    if (call.grad_residual) {
        require(residual_layer_ + 1 < count || !layers_.back().adds_last,
                "what is added last to the output has its gradient, and no other");
        first = std::min(first, residual_layer_);
    }
    std::vector<Stage<const float>> stages;
    stages.reserve(count);
    for_each_stage(layers_, call.layers, groups_, call.statistics,
                   [&](const Stage<const float>& stage) { stages.push_back(stage); });
    std::int64_t largest = 0, channels = 0;
    for (const ChainLayer& layer : layers_) {
        largest = std::max(largest, stored_bytes(layer));
        channels = std::max(channels, layer.shape().out_channels);
    }
    PixelMemory memory(largest);
    const Floats floats((2 * groups_ + 2) * channels);
    float *const sum = floats.first(), *const sum_deviation = sum + groups_ * channels;
    float *const unwanted_weight = sum_deviation + groups_ * channels, *const unwanted_bias =
                                                                           unwanted_weight + channels;

    std::vector<PixelMemory::Block> added(count);       // gradients of layers' inputs, from where those were added
    const Floats wide(largest_narrow_weight(layers_));  // a weight, or its gradient, in float32
    // Of what the layer puts out, with the sums where there are any; then of the convolution's raw output.
    PixelMemory::Block gradient{};
    for (std::size_t i = count; i-- > first;) {
        const Stage<const float>& stage = stages[i];
        const ChainLayer& layer = stage.layer;
        const LayerTensors& tensors = stage.tensors;
        const LayerGradients& wanted = call.gradients[i];
        const ConvolutionShape& shape = layer.shape();
        const bool last = i + 1 == count, training = layer.norm == Norm::batch;
        float* const of_bn_weight = wanted.bn_weight ? wanted.bn_weight : unwanted_weight;
        float* const of_bn_bias = wanted.bn_bias ? wanted.bn_bias : unwanted_bias;

        // The gradient of the convolution's raw output, and those of γ and β.
        const bool given = last && layer.is_bare();
        const bool bias_is_known = layer.norm == Norm::none && !given;  // it is β's
        if (given) {
            // Nothing lies between the two.
        } else if (layer.max_pool) {
            const PixelMemory::Block result = memory.take(stored_bytes(layer));
            max_pool_backward({stage.pool_shape(), stage.pending(tensors.stored),
                               last ? call.grad_output : gradient.begin, tensors.winners, training, stage.eps(),
                               tensors.bn_weight, stage.mean, stage.var, result.begin, of_bn_weight, of_bn_bias},
                              threads);
            memory.give(gradient);
            gradient = result;
        } else if (!gradient_has_sums(i)) {
            const PixelMemory::Block result = memory.take(stored_bytes(layer));
            const std::int64_t adds = last && call.residual_is_input ? 0 : layer.adds;
            // Of what is added last the gradient is the result's.
            const PixelMemory::Block residual =
                layer.adds_last ? PixelMemory::Block{}
                : adds >= 0     ? memory.take(stored_bytes(layer))
                                : PixelMemory::Block{i == residual_layer_ ? call.grad_residual : nullptr, 0};
            const void* const grad = last ? call.grad_output : gradient.begin;
            const void* const output = last ? call.output : tensors.written;
            const void* const side = output ? output : grad;
            batch_norm_leaky_relu_backward(
                {stage.norm_shape(), grad, tensors.stored, tensors.bn_weight, tensors.bn_bias, stage.mean, stage.var,
                 training, result.begin, of_bn_weight, of_bn_bias, residual.begin ? side : nullptr, residual.begin},
                threads);
            if (layer.adds_last && adds >= 0) {
                added[static_cast<std::size_t>(adds)] =
                    last ? PixelMemory::Block{const_cast<void*>(call.grad_output), 0} : gradient;  // it is only read
            } else {
                if (adds >= 0) added[static_cast<std::size_t>(adds)] = residual;
                memory.give(gradient);
            }
            gradient = result;
        } else {
            if (layer.norm == Norm::none) {
                std::fill_n(of_bn_bias, shape.out_channels, 0.0f);
                for (std::int64_t at = 0; at < groups_ * shape.out_channels; ++at)
                    of_bn_bias[at % shape.out_channels] += sum[at];
            } else {
                const PixelMemory::Block result =
                    layer.adds == ChainLayer::nothing ? gradient : memory.take(stored_bytes(layer));
                settle_pending_gradient(
                    {shape.dtype, rows_of(shape), shape.out_channels, groups_, layer.eps, layer.negative_slope,
                     layer.activation_first, training, gradient.begin, result.begin, tensors.stored, tensors.bn_weight,
                     stage.mean, stage.var, sum, sum_deviation, of_bn_weight, of_bn_bias},
                    threads);
                if (layer.adds >= 0)
                    added[static_cast<std::size_t>(layer.adds)] = gradient;
                else if (layer.adds == ChainLayer::given)
                    memory.give(gradient);  // if it is not the residual's own place
                gradient = result;
            }
        }
        if (call.overwrites_kept && !last && writes(i) && !layer.max_pool)
            memory.give({tensors.written, output_bytes(layer)});
        const void* const raw = given ? call.grad_output : gradient.begin;
        if (call.overwrites_kept) memory.give({tensors.stored, stored_bytes(layer)});
        if (wanted.bias) {
            if (training && !layer.activation_first)  // subtracting the mean cancels a bias
                std::fill_n(wanted.bias, shape.out_channels, 0.0f);
            else if (bias_is_known)
                std::copy_n(of_bn_bias, shape.out_channels, wanted.bias);
            else
                channel_sums({shape.dtype, rows_of(shape), shape.out_channels, raw, wanted.bias}, threads);
        }

        // The gradients of the convolution's weight and input.
        const Stage<const float>* const previous = i > 0 ? &stages[i - 1] : nullptr;
        const bool pending = previous && !writes(i - 1);
        const PendingActivation before = pending ? previous->pending(previous->tensors.stored)
                                                 : PendingActivation{previous ? previous->tensors.written : call.input,
                                                                     nullptr, nullptr, 1.0f, false};
        const std::int64_t groups = pending ? groups_ : 1;
        if (wanted.weight) {
            require(layer.backward_weight != nullptr, "a weight's gradient is asked for, but not made here");
            float* const of_weight = layer.narrow_weight ? wide.first() : static_cast<float*>(wanted.weight);
            layer.backward_weight->backward_weight(
                {layer.backward_weight->grouped(groups), before, raw, of_weight, stage.laid_out(nullptr)}, threads);
            if (layer.narrow_weight)
                convert({{of_weight, wanted.weight, layer.narrow_weight}}, Dtype::bfloat16, threads);
        }
        if (i == first && !call.grad_input) break;
        require(layer.backward_input != nullptr, "an input's gradient is asked for, but not made here");
        const bool summed = previous && gradient_has_sums(i - 1);
        const bool of_residual =
            previous && (summed || previous->layer.adds_last) && i - 1 == residual_layer_ && call.grad_residual;
        const PixelMemory::Block next = i == 0        ? PixelMemory::Block{call.grad_input, 0}
                                        : of_residual ? PixelMemory::Block{call.grad_residual, 0}
                                                      : memory.take(output_bytes(previous->layer));
        layer.backward_input->backward_input(
            {layer.backward_input->grouped(summed ? groups_ : 1), raw, stage.weight(wide.first(), threads),
             summed ? previous->pending(previous->tensors.stored) : before, summed ? previous->mean : nullptr,
             next.begin, summed ? sum : nullptr, summed ? sum_deviation : nullptr, added[i].begin,
             summed && writes(i - 1) ? previous->tensors.written : nullptr},
            threads);
        memory.give(gradient);
        memory.give(added[i]);
        if (call.overwrites_kept && previous && previous->layer.max_pool)
            memory.give({previous->tensors.written, output_bytes(previous->layer)});
        gradient = next;
    }
}

}  // namespace ganvas::cpu

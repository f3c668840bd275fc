// A chain of layers in one call: convolutions, each with a norm, an activation and pooling after it, or without. What
// one layer hands the next is a pending activation, and backward a pending gradient.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "convolutions.h"

namespace ganvas::cpu {

// `fixed`: mean and variance are given. Numbers are those of the enumeration in Python.
enum class Norm { none, fixed, batch, count };

struct ChainLayer {
    std::shared_ptr<const Convolution> forward;
    std::shared_ptr<const Convolution> backward_input;   // null: no gradient goes that way here
    std::shared_ptr<const Convolution> backward_weight;  // likewise
    std::array<std::int64_t, 4> weight_strides;          // of the output's channels, the input's, rows and columns
    std::int64_t narrow_weight;                          // numbers of a bfloat16 weight, without gaps; 0: of float32
    bool narrow_values, narrow_moving;  // whether the caller's values per channel are bfloat16, running ones apart
    Norm norm;
    float eps, negative_slope;
    bool activation_first;
    bool max_pool;  // 2×2, with stride 2
    // What is added to the norm, before the activation: the input of this layer or one before, `nothing`, or what the
    // chain is `given`.
    std::int64_t adds;
    bool adds_last;  // to the activation instead
    static constexpr std::int64_t nothing = -1, given = -2;

    const ConvolutionShape& shape() const { return forward->shape; }
    // Whether nothing follows the convolution.
    bool is_bare() const { return norm == Norm::none && negative_slope == 1.0f && !max_pool; }
};

// A layer's tensors. Of pixels: [N, H, W, C] of the chain's dtype. Of channels: float32.
struct LayerTensors {
    const void* weight;
    const float* bias;                  // [Co] or null
    const float *bn_weight, *bn_bias;   // [Co] or null
    float *running_mean, *running_var;  // [Co] or null: moved with batch statistics, given with fixed ones
    float momentum;
    std::int64_t* batches;  // or null: counts the groups whose statistics were taken
    void* stored;           // the convolution's output; null: not kept
    void* written;          // what it hands the next, where that is not pending; null: not kept, or the output
    std::uint8_t* winners;  // like the pooled pixels: which of each four; null: not kept
};

// Where a layer's gradients go, each like what it belongs to; null where they are not wanted.
struct LayerGradients {
    void* weight;
    float *bias, *bn_weight, *bn_bias;

    bool any() const { return weight || bias || bn_weight || bn_bias; }
};

struct ChainForward {
    const void* input;           // [N, H, W, C]
    const void* residual;        // or null: added by the layer that adds what is given, else by the last
    float* statistics;           // Chain::statistics_floats()
    void* output;                // the last layer's activation, pooled if it pools
    const LayerTensors* layers;  // of those before the last all are kept, or none
};

struct ChainBackward {
    const void* grad_output;
    const void* input;
    const void* output;       // what forward wrote, where a residual was added
    const float* statistics;  // what forward left
    void* grad_input;         // null: not wanted
    void* grad_residual;      // null: there was none, it was the input, or the last layer adds it last: grad_output
    bool residual_is_input;   // its gradient is part of the input's
    bool overwrites_kept;     // what forward kept is needed no more: gradients may take its place
    const LayerTensors* layers;
    const LayerGradients* gradients;
};

class Chain {
  public:
    // Throws std::invalid_argument where the layers do not fit each other. What is added is the chain's input or the
    // activation of a layer, which then is written; it is added once.
    Chain(std::vector<ChainLayer> layers, std::int64_t groups);

    const std::vector<ChainLayer>& layers() const { return layers_; }
    const ConvolutionShape& first() const { return layers_.front().shape(); }
    // Whether there is a layer that adds what is given, and whether there can be.
    bool wants_residual() const { return layers_[residual_layer_].adds == ChainLayer::given; }
    bool takes_residual() const { return layers_[residual_layer_].adds < 0; }
    // Whether a layer hands the next one its activation written: something was added, or it is pooled, or added itself.
    bool writes(std::size_t layer) const {
        return layers_[layer].adds != ChainLayer::nothing || layers_[layer].max_pool || adder_[layer + 1] >= 0;
    }
    // Whether the gradient of its activation comes to a layer at the kink, and with the sums that a norm's needs.
    bool gradient_has_sums(std::size_t layer) const;
    // Of each layer mean, variance, scale and shift: [4, G, C].
    std::int64_t statistics_floats() const;

    void forward(const ChainForward& call, int threads) const;
    void backward(const ChainBackward& call, int threads) const;

  private:
    std::vector<ChainLayer> layers_;
    std::vector<std::int64_t> adder_;  // of each layer, the one that adds its input, or -1; of the output -1
    std::size_t residual_layer_;       // that adds what is given
    std::int64_t groups_;
};

}  // namespace ganvas::cpu

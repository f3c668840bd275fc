// Element types of the tensors that Python hands over. Arithmetic is float32 in all of them.
#pragma once

namespace ganvas {

enum class Dtype { float32, bfloat16, float16 };  // float16: on GPUs only

constexpr int element_bytes(Dtype dtype) {
    return dtype == Dtype::float32 ? 4 : 2;
}

}  // namespace ganvas

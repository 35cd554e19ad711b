// X into pages, rotated on the way: a block has one token.
#include "common/launch.h"
#include "store/hadamard.h"
#include "store/store.h"
#include "store/uniform.h"

namespace xquant::store {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

struct Params {
    xquant_cuda_store_call call;
};

struct InShared {
    const float* numbers;
    int first;
    XQUANT_DEVICE float operator()(int i) const { return numbers[padded(first + i)]; }
};

__global__ void __launch_bounds__(kThreads) store_rotated_kernel(const Params params) {
    const auto& call = params.call;
    const xquant_cuda_store_stream& stream = call.streams[0];
    const int thread = static_cast<int>(threadIdx.x), width = stream.width;
    const int64_t token = blockIdx.x, at = call.slot_mapping[token];
    if (at < 0) return;
    float* numbers = reinterpret_cast<float*>(shared_memory());
    const int space = padded(width + 63);

    // The first pass reads what it transforms: blocks have at least 8 channels.
    for (int i = thread * 8; i < width; i += kThreads * 8) {
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            x[j] = load_as_float(stream.input, token * stream.input_stride + i + j, stream.type) * call.signs[i + j];
        }
        butterflies(x);
#pragma unroll
        for (int j = 0; j < 8; ++j) numbers[padded(i + j)] = x[j];
    }
    __syncthreads();
    hadamard_from(numbers, width, call.block, 8, thread, kThreads);

    const int blocks = width / call.block;
    float* mixed = blocks == 1 ? numbers : numbers + space;
    for (int i = thread; i < width; i += kThreads) {
        const float* weights = call.mix + i / call.block * blocks;
        float sum = 0;
        for (int j = 0; j < blocks; ++j) sum += weights[j] * numbers[padded(j * call.block + i % call.block)];
        mixed[padded(i)] = sum;
    }
    __syncthreads();

    const Slot slot = find_slot(call, at);
    uint8_t* codes = reinterpret_cast<uint8_t*>(mixed + space);
    const int warp = thread / kWarp;
    for (int group = warp; group < width / stream.group_size; group += kWarps) {
        const int first = group * stream.group_size;
        store_group(stream, slot, InShared{mixed, first}, codes + first, 0, group, thread % kWarp);
    }
}

}  // namespace
}  // namespace xquant::store

int xquant_cuda_store_rotated(const xquant_cuda_store_call* call, void* stream) {
    using namespace xquant::store;
    const xquant_cuda_store_stream& of = call->streams[0];
    if (call->num_streams != 1 || of.num_heads != 1 || of.bits == 0 || call->block < 8 || of.width % call->block != 0) {
        return cudaErrorInvalidValue;
    }
    const int space = (of.width + 63) + (of.width + 63) / 64 * 8;
    const size_t buffers = of.width == call->block ? 1 : 2;
    const dim3 grid{static_cast<unsigned>(call->num_tokens), 1, 1};
    return xquant::launch(store_rotated_kernel, grid, kThreads,
                          buffers * static_cast<size_t>(space) * sizeof(float) + static_cast<size_t>(of.width), stream,
                          Params{*call});
}

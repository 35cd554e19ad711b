// Latents into pages: a warp has one group, or one head of an allocated stream, of one token.
#include "common/launch.h"
#include "store/allocated.h"
#include "store/store.h"
#include "store/uniform.h"

namespace xquant::store {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

struct Params {
    xquant_cuda_store_call call;
    int values;  // channels of a warp's task, at most
};

struct InGlobal {
    const void* data;
    int64_t first;
    int type;
    XQUANT_DEVICE float operator()(int i) const { return load_as_float(data, first + i, type); }
};

XQUANT_DEVICE int tasks_of(const xquant_cuda_store_stream& stream) {
    return stream.bits == 0 ? stream.num_heads : stream.num_heads * (stream.width / stream.group_size);
}

// Grid: tasks of a token over the warps of a block, tokens, streams.
__global__ void __launch_bounds__(kThreads) store_latents_kernel(const Params params) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto& call = params.call;
    const xquant_cuda_store_stream& stream = call.streams[blockIdx.z];
    const int task = static_cast<int>(blockIdx.y) * kWarps + warp;
    const int token = static_cast<int>(blockIdx.x);
    const int64_t at = call.slot_mapping[token];
    // Warps work by themselves: there is no barrier of the block.
    if (task >= tasks_of(stream) || at < 0) return;
    const Slot slot = find_slot(call, at);
    float* values = reinterpret_cast<float*>(shared_memory()) + warp * params.values;
    uint8_t* codes = shared_memory() + kWarps * params.values * sizeof(float) + warp * params.values;
    const int64_t of_token = token * stream.input_stride;
    if (stream.bits == 0) {
        const InGlobal input{stream.input, of_token + task * stream.width, stream.type};
        const int channels = stream.heads[task].channels;
        for (int i = lane; i < channels; i += kWarp) values[i] = finite(input(i));
        __syncwarp();
        store_allocated_head(stream, slot, values, codes, task, lane);
    } else {
        const int groups = stream.width / stream.group_size;
        // Read twice: the second time from L1.
        const InGlobal input{stream.input, of_token + task * stream.group_size, stream.type};
        store_group(stream, slot, input, codes, task / groups, task % groups, lane);
    }
}

}  // namespace
}  // namespace xquant::store

int xquant_cuda_store_latents(const xquant_cuda_store_call* call, void* stream) {
    using namespace xquant::store;
    if (call->num_streams < 1 || call->num_streams > 2) return cudaErrorInvalidValue;
    int tasks = 0, values = 0;
    for (int i = 0; i < call->num_streams; ++i) {
        const xquant_cuda_store_stream& of = call->streams[i];
        const int of_stream = of.bits == 0 ? of.num_heads : of.num_heads * (of.width / of.group_size);
        const int channels = of.bits == 0 ? of.width : of.group_size;
        if (of_stream > tasks) tasks = of_stream;
        if (channels > values) values = channels;
    }
    const Params params{*call, (values + 15) / 16 * 16};
    const dim3 grid{static_cast<unsigned>(call->num_tokens), static_cast<unsigned>((tasks + kWarps - 1) / kWarps),
                    static_cast<unsigned>(call->num_streams)};
    return xquant::launch(store_latents_kernel, grid, kThreads, kWarps * params.values * (sizeof(float) + 1), stream,
                          params);
}

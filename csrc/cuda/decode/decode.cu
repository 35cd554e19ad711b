#include "decode/decode.h"

#include "common/launch.h"
#include "decode/kernel.h"

namespace xquant::decode {
namespace {

template <int HeadSize, int T, int K>
cudaError_t start(const Params& params, void* stream) {
    const dim3 grid{static_cast<unsigned>(params.call.num_sequences), static_cast<unsigned>(params.plan.num_kv_heads),
                    static_cast<unsigned>(params.call.splits)};
    return launch(decode_kernel<HeadSize, T, K>, grid, kThreads,
                  shared_bytes<HeadSize>(params.plan, params.call.row_tiles), stream, params);
}

template <int HeadSize, int T>
cudaError_t start_key_type(const Params& params, void* stream) {
    if (params.plan.key_type == kFp16) return start<HeadSize, T, kFp16>(params, stream);
    if (params.plan.key_type == kInt8) return start<HeadSize, T, kInt8>(params, stream);
    return cudaErrorInvalidValue;
}

template <int HeadSize>
cudaError_t start_type(const Params& params, void* stream) {
    if (params.call.type == kFp16) return start_key_type<HeadSize, kFp16>(params, stream);
    if (params.call.type == kBf16) return start_key_type<HeadSize, kBf16>(params, stream);
    return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace xquant::decode

int xquant_cuda_decode(const xquant_cuda_decode_plan* plan, const xquant_cuda_decode_call* call, void* stream) {
    using namespace xquant::decode;
    const Params params{*plan, *call};
    if (reinterpret_cast<uintptr_t>(call->pages) % 16 != 0 || call->page_stride % 16 != 0 ||
        plan->block_size % kStrip != 0 || call->sum_columns > plan->head_size || call->row_tiles < 1 ||
        call->row_tiles > 2 || call->splits < 1) {
        return cudaErrorInvalidValue;
    }
    if (plan->head_size == 64) return start_type<64>(params, stream);
    if (plan->head_size == 128) return start_type<128>(params, stream);
    return cudaErrorInvalidValue;
}

int64_t xquant_cuda_decode_shared_bytes(const xquant_cuda_decode_plan* plan, int row_tiles) {
    using namespace xquant::decode;
    return static_cast<int64_t>(plan->head_size == 64 ? shared_bytes<64>(*plan, row_tiles)
                                                      : shared_bytes<128>(*plan, row_tiles));
}

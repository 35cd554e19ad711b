// A product of either kind and a load of matrices, for the test of the emulation itself: operands in, results out, by lane.
#include "common/mma.h"
#include "common/launch.h"

namespace {

struct Params {
    const uint32_t* a;  // [32, 4]
    const uint32_t* b;  // [32, 2]
    float* c;           // [32, 4], added to
    const uint16_t* matrices;  // [32, 8]
    uint32_t* loaded;          // [32, 4]
    int bf16;
    int transposed;
};

void kernel(Params params) {
    const int lane = static_cast<int>(threadIdx.x);
    uint32_t a[4], b[2], r[4];
    float c[4];
    for (int i = 0; i < 4; ++i) a[i] = params.a[lane * 4 + i];
    for (int i = 0; i < 2; ++i) b[i] = params.b[lane * 2 + i];
    for (int i = 0; i < 4; ++i) c[i] = params.c[lane * 4 + i];
    if (params.bf16) {
        xquant::mma_16816<xquant::kBf16>(c, a, b);
    } else {
        xquant::mma_16816<xquant::kFp16>(c, a, b);
    }
    auto* rows = reinterpret_cast<uint16_t*>(xquant::shared_memory());
    for (int i = 0; i < 8; ++i) rows[lane * 8 + i] = params.matrices[lane * 8 + i];
    __syncwarp();
    if (params.transposed) {
        xquant::load_matrices_transposed(r, rows + lane * 8);
    } else {
        xquant::load_matrices(r, rows + lane * 8);
    }
    for (int i = 0; i < 4; ++i) params.c[lane * 4 + i] = c[i];
    for (int i = 0; i < 4; ++i) params.loaded[lane * 4 + i] = r[i];
}

struct ByteParams {
    const uint32_t* a;  // [32, 4]
    const uint32_t* b;  // [32, 2]
    int32_t* c;         // [32, 4], added to
};

void byte_kernel(ByteParams params) {
    const int lane = static_cast<int>(threadIdx.x);
    uint32_t a[4], b[2];
    int32_t c[4];
    for (int i = 0; i < 4; ++i) a[i] = params.a[lane * 4 + i];
    for (int i = 0; i < 2; ++i) b[i] = params.b[lane * 2 + i];
    for (int i = 0; i < 4; ++i) c[i] = params.c[lane * 4 + i];
    xquant::mma_16832(c, a, b);
    for (int i = 0; i < 4; ++i) params.c[lane * 4 + i] = c[i];
}

}  // namespace

extern "C" int xquant_emulation_products(const uint32_t* a, const uint32_t* b, float* c, const uint16_t* matrices,
                                         uint32_t* loaded, int bf16, int transposed) {
    const Params params{a, b, c, matrices, loaded, bf16, transposed};
    return xquant::launch(kernel, dim3{1, 1, 1}, 32, 512, nullptr, params);
}

extern "C" int xquant_emulation_byte_product(const uint32_t* a, const uint32_t* b, int32_t* c) {
    const ByteParams params{a, b, c};
    return xquant::launch(byte_kernel, dim3{1, 1, 1}, 32, 0, nullptr, params);
}

// All kernels for the instruction set that the including file is compiled for.
//
// XQUANT_KERNELS names the table that the file defines. Everything else has internal linkage: were it shared, the
// linker would keep one copy of each function, compiled for whichever instruction set it met first. For the same
// reason nothing here uses the C++ library.
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace xquant {
namespace {

#include "simd.h"
#include "convert.h"
#include "layout.h"
#include "transpose.h"
#include "unpack.h"
#include "unpack_allocated.h"
#include "gemm.h"
#include "rematerialize.h"
#include "tile.h"
#include "integer.h"
#include "load_keys.h"
#include "softmax.h"
#include "integer_values.h"
#include "attention.h"
#include "quantize.h"
#include "rotate.h"
#include "store.h"

}  // namespace

const Kernels XQUANT_KERNELS = {
    XQUANT_KERNELS_NAME, store_scratch, attention_scratch, store_tokens, attend, merge, finish,
};

}  // namespace xquant

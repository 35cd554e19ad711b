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
#include "exact_tokens.h"
#include "softmax.h"
#include "integer_values.h"
#include "attention.h"
#include "quantize.h"
#include "rotate.h"
#include "store.h"
#include "hot_tokens.h"
#include "kivi/pages.h"
#include "kivi/scratch.h"
#include "kivi/exact.h"
#include "kivi/integer_keys.h"
#include "kivi/keys.h"
#include "kivi/attention.h"
#include "kivi/store.h"

}  // namespace

const Kernels XQUANT_KERNELS = {
    XQUANT_KERNELS_NAME, store_scratch, attention_scratch, store_tokens, attend, merge, finish,
    hot_scratch, read_tokens, finish_tokens,
    kivi_store_scratch, kivi_attention_scratch, kivi_store_tokens, kivi_store_group, kivi_attend,
};

}  // namespace xquant

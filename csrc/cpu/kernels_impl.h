// All kernels for the instruction set that the including file is compiled for.
//
// XQUANT_KERNELS names the table that the file defines. Everything else has internal linkage: the headers below, and
// those that they include, put what they hold into an anonymous namespace. Were it shared, the linker would keep one copy
// of each function, compiled for whichever instruction set it met first. For the same reason none of them uses the C++
// library.
#include "attention/attention.h"
#include "attention/tile.h"
#include "hot/hot_tokens.h"
#include "hot/write.h"
#include "kernels.h"
#include "kivi/attention.h"
#include "kivi/store.h"
#include "store/store.h"

namespace xquant {

const Kernels XQUANT_KERNELS = {
    /* name */ XQUANT_KERNELS_NAME,
    /* store_scratch */ store_scratch,
    /* attention_scratch */ attention_scratch,
    /* store */ store_tokens,
    /* attend_stretch */ attend_stretch,
    /* merge */ merge,
    /* finish */ finish,
    /* hot_scratch */ hot_scratch,
    /* read_tokens */ read_tokens,
    /* finish_tokens */ finish_tokens,
    /* hot_stage */ hot_stage,
    /* hot_heads_scratch */ hot_heads_scratch,
    /* hot_read */ hot_read,
    /* hot_write */ hot_write,
    /* kivi_store_scratch */ kivi_store_scratch,
    /* kivi_attention_scratch */ kivi_attention_scratch,
    /* kivi_store */ kivi_store_tokens,
    /* kivi_store_group */ kivi_store_group,
    /* kivi_attend_stretch */ kivi_attend_stretch,
};

}  // namespace xquant

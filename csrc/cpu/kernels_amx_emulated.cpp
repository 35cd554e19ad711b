// The source of kernels_amx.cpp with AMX's instructions in plain C++, for tests on processors without it: never chosen
// unless asked for. Compiled with the flags of kernels_vnni.cpp.
#if defined(__x86_64__)
#define XQUANT_EMULATE_TILES
#define XQUANT_KERNELS kEmulatedAmxKernels
#define XQUANT_KERNELS_NAME "amx-emulated"
#include "kernels_impl.h"
#endif

// The kernels that calls run on.
#pragma once

#include "kernels.h"

namespace xquant {

const Kernels& chosen_kernels();

}  // namespace xquant

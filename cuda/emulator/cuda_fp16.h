// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header of this name, which needs a CUDA compiler.
#pragma once
#include "emu/half.hpp"

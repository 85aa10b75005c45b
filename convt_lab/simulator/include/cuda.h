// Nothing of the driver's API, but many a source includes this and needs no more than the types.

#pragma once

#include <cuda_runtime.h>

#define CUDA_VERSION CUDART_VERSION

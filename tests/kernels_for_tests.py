"""Small CUDA kernels that several tests launch."""

SCALE = """
__global__ void scale(const float* __restrict__ x, float* y, float factor, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = factor * x[i];
}
"""

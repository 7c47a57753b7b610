// The CUDA sources as they ship, for the host's compiler.
#include "../../csrc/cuda/passes.cu"

// Which of the emulated devices a tensor is taken to lie on; included before all sources that use
// torch. Their memory is one, but a step treats them as it does several GPUs.
#pragma once

#include <ATen/core/Tensor.h>

c10::Device fusedopt_emulator_place(const at::Tensor& tensor);

#define FUSEDOPT_PLACE_OF fusedopt_emulator_place

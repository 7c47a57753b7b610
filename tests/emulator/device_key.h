// Which of the emulated devices a tensor is taken to lie on; included before all sources that use
// torch. Their memory is one, but a step treats them as it does several GPUs.
#pragma once

#include <ATen/core/Tensor.h>

c10::Device fusedopt_emulator_device_key(const at::Tensor& tensor);

#define FUSEDOPT_DEVICE_KEY fusedopt_emulator_device_key

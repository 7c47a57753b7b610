#include "torch/exchange.h"

#include "torch/aten.h"
#include "torch/cuda_stream.h"

namespace fusedopt {

namespace {

at::Tensor sum_of(const DeviceTensors& tensors) {
  return control_slot(tensors, offsetof(StepControl, sum_of_squares));
}

// Of the sums of a device's chunks, leaves those that are not clipped only if they are inf or nan.
void leave_out_unclipped(DeviceTensors& tensors, const at::Tensor& chunk_sums) {
  for (const TensorShape& shape : tensors.layout->shapes()) {
    if (!tensors.group(shape.group)->is_unclipped) continue;
    const at::Tensor its = chunk_sums.narrow(0, shape.first_chunk, chunks_of(shape.numel));
    its.mul_(its.isfinite().logical_not_());
  }
}

}  // namespace

void exchange_with_ranks(std::vector<DeviceTensors>& devices, const std::vector<StepParams>& steps,
                         const Exchange& exchange) {
  std::vector<at::Tensor> messages;
  for (size_t i = 0; i < devices.size(); ++i) {
    const at::Device device = devices[i].device;
    messages.push_back(new_zeros(kMessageSize, at::kLong, device));
    const at::Tensor counted = exchange.counted.at(i).to(device);
    TORCH_CHECK_VALUE(counted.scalar_type() == at::kBool && counted.is_contiguous() &&
                          counted.numel() == steps[i].num_chunks,
                      "counted has not one bool for each of ", steps[i].num_chunks, " chunks");
    const int status =
        write_message(steps[i], counted.const_data_ptr<bool>(),
                      messages[i].mutable_data_ptr<int64_t>(), kernels_device(devices[i]));
    check_launch(status, device);
  }
  const at::Tensor total = exchange.add_up(messages);
  TORCH_CHECK_VALUE(
      total.scalar_type() == at::kLong && total.is_contiguous() && total.numel() == kMessageSize,
      "an exchange returned no message");
  for (size_t i = 0; i < devices.size(); ++i) {
    const at::Tensor its = total.to(devices[i].device);
    const int status =
        read_message(steps[i], its.const_data_ptr<int64_t>(),
                     devices[i].found_inf.mutable_data_ptr<float>(), kernels_device(devices[i]));
    check_launch(status, devices[i].device);
  }
}

void exchange_norms(std::vector<DeviceTensors>& devices, StepParams step) {
  std::vector<at::Tensor> chunk_sums;
  for (DeviceTensors& it : devices) {
    chunk_sums.push_back(it.chunk_sums().to(devices[0].device, at::kDouble, false, /*copy=*/true));
    leave_out_unclipped(it, chunk_sums.back());
  }
  const at::Tensor all = concatenated(chunk_sums);
  step.has_unclipped = false;  // the table of chunks is that of one device
  step.chunk_sums = all.data_ptr<double>();
  step.num_chunks = all.numel();
  check_launch(reduce(step, kernels_device(devices[0])), devices[0].device);
  for (size_t i = 1; i < devices.size(); ++i) sum_of(devices[i]).copy_(sum_of(devices[0]));
}

void exchange_coefs(std::vector<DeviceTensors>& devices) {
  const at::Tensor smallest = control_slot(devices[0], offsetof(StepControl, clip_coef));
  for (size_t i = 1; i < devices.size(); ++i) {
    const at::Tensor other =
        control_slot(devices[i], offsetof(StepControl, clip_coef)).to(smallest.device());
    smallest.copy_(other.where(other.lt(smallest), smallest));
  }
  const at::Tensor& ring = devices[0].step_ring;
  if (!ring.defined()) return;
  const at::Tensor steps = control_slot(devices[0], offsetof(StepControl, steps));
  const at::Tensor row = steps.sub(1).remainder(ring.size(0)).to(at::kLong);
  ring.select(1, 1).index_copy_(0, row, smallest);
}

void exchange_step_number(std::vector<DeviceTensors>& devices) {
  const at::Tensor steps = control_slot(devices[0], offsetof(StepControl, steps));
  for (size_t i = 1; i < devices.size(); ++i) {
    control_slot(devices[i], offsetof(StepControl, steps)).copy_(steps);
  }
}

}  // namespace fusedopt

#include <c10/core/GradMode.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "kernels.h"
#include "torch/clip_grads.h"
#include "torch/cuda_stream.h"
#include "torch/huge_pages.h"
#include "torch/plan.h"
#include "torch/step.h"

namespace fusedopt {

namespace {

template <size_t kCount>
py::tuple names_of(const char* const (&names)[kCount]) {
  py::tuple result(kCount);
  for (size_t i = 0; i < kCount; ++i) result[i] = names[i];
  return result;
}

py::dict names_of(const std::vector<StateName>& states) {
  py::dict result;
  for (const StateName& state : states) result[state.name] = state.first_value;
  return result;
}

// The constants that fusedopt/core/agreement.py compares with Python's.
py::dict constants() {
  py::dict result;
  result["chunk_size"] = kChunkSize;
  result["row_bytes"] = kRowBytes;
  result["total_lanes"] = kTotalLanes;
  result["tensor_lanes"] = kTensorLanes;
  result["control"] = names_of(kControlFields);
  result["step_columns"] = names_of(kStepColumnNames);
  result["param_columns"] = names_of(kParamColumns);
  result["limits"] = names_of(kLimitNames);
  py::dict rules;
  for (const RuleInfo& rule : all_rules()) {
    rules[rule.name.c_str()] = py::make_tuple(names_of(rule.scalars), names_of(rule.states));
  }
  result["rules"] = rules;
  return result;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("constants") = constants();
  m.attr("built_with_cuda") = built_with_cuda();
  m.attr("cuda_device_type") = c10::DeviceTypeName(cuda_device_type(), true);
  m.def("cpu_isa", &cpu_isa);
  m.def("prefer_huge_pages", &prefer_huge_pages, py::arg("tensor"));

  m.def(
      "clip_grads",
      [](const py::list& tensors, bool of_params, bool checked, const std::string& backend,
         double max_norm, double norm_type, bool skip_nonfinite,
         std::optional<std::variant<at::Tensor, double>> total_norm) {
        return clip_grads(tensors, of_params, checked, backend,
                          {max_norm, norm_type, skip_nonfinite, std::move(total_norm)});
      },
      py::arg("tensors"), py::arg("of_params"), py::arg("checked"), py::arg("backend"),
      py::arg("max_norm"), py::arg("norm_type"), py::arg("skip_nonfinite"), py::arg("total_norm"));

  // Local to this module, so that a second build can be loaded too: tests load the emulated one.
  py::class_<Plan>(m, "Plan", py::module_local())
      .def(py::init<const std::string&, const std::string&, const py::list&, const py::dict&,
                    const py::dict&, const std::vector<at::Tensor>&>(),
           py::arg("rule"), py::arg("backend"), py::arg("param_groups"), py::arg("state"),
           py::arg("counters"), py::arg("rings"))
      .def("nonfinite", &Plan::nonfinite)
      .def(
          "step",
          [](Plan& plan, const py::list& param_groups, const py::dict& state, double max_grad_norm,
             bool measure, bool skip_nonfinite, const std::optional<at::Tensor>& grad_scale,
             const std::optional<at::Tensor>& found_inf,
             std::optional<std::tuple<int, std::vector<double>, at::Tensor>> clip,
             const at::Tensor& control) {
            std::optional<LimitTensors> limit;
            if (clip.has_value()) {
              auto& [kind, arguments, limit_state] = *clip;
              limit = LimitTensors{kind, std::move(arguments), std::move(limit_state)};
            }
            const c10::NoGradGuard no_grad;
            if (!plan.refresh(param_groups, state)) return false;
            step(plan.rule(), plan.devices(),
                 {max_grad_norm, std::move(limit), measure, skip_nonfinite, grad_scale, found_inf,
                  control},
                 [&] { return plan.keep_alive(); });
            return true;
          },
          py::arg("param_groups"), py::arg("state"), py::arg("max_grad_norm"), py::arg("measure"),
          py::arg("skip_nonfinite"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("clip"),
          py::arg("control"));
}

}  // namespace fusedopt

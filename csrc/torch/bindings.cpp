#include <c10/core/GradMode.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <iterator>
#include <string>

#include "kernels.h"
#include "torch/clip_grads.h"
#include "torch/cuda_stream.h"
#include "torch/huge_pages.h"
#include "torch/local_view.h"
#include "torch/no_python.h"
#include "torch/plan.h"
#include "torch/size_lock.h"
#include "torch/step.h"
#include "torch/swap_grads.h"

// pybind11's errors call it inline. Files that include torch/python.h alone see no definition, and
// whether this file emits one by itself depends on the version of pybind11 that torch brings.
template std::string pybind11::handle::cast<std::string>() const;

namespace fusedopt {

namespace {

template <size_t kCount>
py::tuple names_of(const char* const (&names)[kCount]) {
  py::tuple result(kCount);
  for (size_t i = 0; i < kCount; ++i) result[i] = names[i];
  return result;
}

template <size_t kCount>
py::tuple describe(const LimitInfo (&limits)[kCount]) {
  py::tuple result(kCount);
  for (size_t i = 0; i < kCount; ++i) {
    result[i] = py::make_tuple(limits[i].name, limits[i].num_arguments);
  }
  return result;
}

py::dict codings_of(const std::vector<StateName>& states) {
  py::dict result;
  for (const StateName& state : states) {
    if (state.coding == Coding::kLinear) result[state.name] = "linear";
    if (state.coding == Coding::kRoot) result[state.name] = "root";
  }
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
  result["run_size"] = kRunSize;
  result["smallest_sum"] = kSmallestSum;
  result["tensor_lanes"] = kTensorLanes;
  result["block_size"] = kBlockSize;
  result["control"] = names_of(kControlFields);
  result["step_columns"] = names_of(kStepColumnNames);
  result["param_columns"] = names_of(kParamColumns);
  result["limits"] = describe(kLimits);
  result["message"] = py::make_tuple(kLimbs, names_of(kMessageCounts));
  py::dict rules;
  for (const RuleInfo& rule : all_rules()) {
    rules[rule.name.c_str()] =
        py::make_tuple(names_of(rule.scalars), names_of(rule.states), codings_of(rule.states));
  }
  result["rules"] = rules;
  return result;
}

// By group: (bits of masters, stochastic parameters, names of stochastic states, seed, states of 8
// bits).
using FormatTuples = std::vector<std::tuple<int, bool, std::vector<std::string>, uint64_t, bool>>;

std::vector<GroupFormat> formats_of(const RuleInfo& rule, const FormatTuples& tuples) {
  std::vector<GroupFormat> result;
  for (const auto& [master_bits, stochastic_param, names, seed, in_blocks] : tuples) {
    GroupFormat format{master_bits, stochastic_param, 0, seed, in_blocks};
    for (const std::string& name : names) {
      for (size_t k = 0; k < rule.states.size(); ++k) {
        if (name == rule.states[k].name) format.stochastic_states |= 1u << k;
      }
    }
    result.push_back(format);
  }
  return result;
}

// Checks a tensor that Python passes to a step. Python code may pass anything.
void check(const char* name, const at::Tensor& tensor, bool fits) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (tensor.defined() && is_plain(impl) && fits && fits_its_storage(impl)) return;
  throw py::type_error(std::string(name) + " is not a plain tensor of the expected form");
}

void check_limit(const LimitTensors& limit) {
  const bool is_known = limit.kind >= 0 && limit.kind < static_cast<int>(std::size(kLimits));
  if (!is_known || static_cast<int>(limit.arguments.size()) != kLimits[limit.kind].num_arguments) {
    throw py::type_error("the kernels know no limit of kind " + std::to_string(limit.kind) +
                         " with " + std::to_string(limit.arguments.size()) + " arguments");
  }
  const at::Tensor& state = limit.state;
  check("a limit's state", state, state.scalar_type() == at::kDouble && state.is_contiguous());
}

void check_call(const StepCall& call, const std::vector<DeviceTensors>& devices) {
  constexpr int64_t kReadings = sizeof(StepControl) / sizeof(double);
  const at::Tensor& control = call.control;
  check("control", control,
        control.scalar_type() == at::kDouble && control.is_contiguous() &&
            control.numel() == kReadings &&
            (devices.empty() || control.device() == devices[0].device));
  for (const auto& [name, scalar] :
       {std::pair("grad_scale", &call.grad_scale), std::pair("found_inf", &call.found_inf)}) {
    if (scalar->has_value()) check(name, **scalar, (*scalar)->numel() == 1);
  }
  if (call.limit.has_value()) check_limit(*call.limit);
}

// See fusedopt/distributed/exchange.py.
Exchange exchange_of(const py::object& object) {
  if (object.is_none()) return {};
  return {object.cast<decltype(Exchange::add_up)>(),
          object.attr("counted").cast<std::vector<at::Tensor>>()};
}

// Returns false, and has changed nothing, if the plan can't take a tensor or an option.
bool step_of(Plan& plan, const py::object& param_groups, const py::object& state,
             const StepCall& call) {
  const Plan::Use use(plan);
  const py::dict states = as_dict(state);
  if (!plan.read_groups(param_groups)) return false;
  const c10::NoGradGuard no_grad;
  const NoPythonDispatch no_python;
  if (!plan.refresh(states)) return false;
  check_call(call, plan.devices());
  SizeLock lock;
  const bool changed = step(plan.rule(), plan.devices(), call, [&] {
    std::vector<c10::Storage> storages = plan.keep_alive();
    lock.take(storages);
    return storages;
  });
  if (changed) plan.bump_versions();
  return true;
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

  m.def("is_same_view", &is_same_view, py::arg("seen"), py::arg("param_groups"), py::arg("state"));
  m.def("take_local_grads", &take_local_grads, py::arg("params"), py::arg("locals"),
        py::arg("layouts"));
  m.def("drop_local_grads", &drop_local_grads, py::arg("locals"));
  m.def("swap_grads", &swap_grads, py::arg("params"), py::arg("grads"));

  m.def("first_overlap", &first_overlap, py::arg("grads"));

  // Local, so that a second build (the emulated one, for tests) can live beside this one.
  py::class_<Plan>(m, "Plan", py::module_local())
      .def(py::init([](const std::string& rule, const std::string& backend,
                       const py::object& param_groups, const py::object& state,
                       const py::dict& counters, const std::vector<at::Tensor>& rings,
                       const FormatTuples& formats, std::vector<int64_t> first_elements) {
             return std::make_unique<Plan>(rule, backend, param_groups, state, counters, rings,
                                           formats_of(find_rule(rule), formats),
                                           std::move(first_elements));
           }),
           py::arg("rule"), py::arg("backend"), py::arg("param_groups"), py::arg("state"),
           py::arg("counters"), py::arg("rings"), py::arg("formats") = FormatTuples(),
           py::arg("first_elements") = std::vector<int64_t>())
      .def("nonfinite", &Plan::nonfinite)
      .def("shared_memory", &Plan::shared_memory)
      .def(
          "step",
          [](Plan& plan, const py::object& param_groups, const py::object& state,
             double max_grad_norm, bool measure, bool skip_nonfinite,
             const std::optional<at::Tensor>& grad_scale,
             const std::optional<at::Tensor>& found_inf,
             std::optional<std::tuple<int, std::vector<double>, at::Tensor>> clip,
             const at::Tensor& control, const py::object& exchange) {
            std::optional<LimitTensors> limit;
            if (clip.has_value()) {
              auto& [kind, arguments, limit_state] = *clip;
              limit = LimitTensors{kind, std::move(arguments), std::move(limit_state)};
            }
            return step_of(plan, param_groups, state,
                           {max_grad_norm, std::move(limit), measure, skip_nonfinite, grad_scale,
                            found_inf, control, exchange_of(exchange)});
          },
          py::arg("param_groups"), py::arg("state"), py::arg("max_grad_norm"), py::arg("measure"),
          py::arg("skip_nonfinite"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("clip"),
          py::arg("control"), py::arg("exchange") = py::none());
}

}  // namespace fusedopt

#include "torch/plan.h"

namespace fusedopt {

bool StateItem::takes(PyObject* object, const PlanParam& plan_param) const {
  if (!is_tensor(object)) return false;
  const c10::TensorImpl* impl = unpack(object).unsafeGetTensorImpl();
  if (!is_plain(impl) || unpack(object).is_neg() || impl->device() != plan_param.device) {
    return false;
  }
  const at::ScalarType its_dtype = unpack(object).scalar_type();
  const bool is_usable = kind == Kind::kState ? has_kernels(its_dtype) : its_dtype == dtype;
  return is_usable && fits(impl, plan_param) && fits_its_storage(impl);
}

bool StateItem::fits(const c10::TensorImpl* impl, const PlanParam& plan_param) const {
  switch (kind) {
    case Kind::kScalar:
      return impl->dim() == 0;
    case Kind::kScales:
      return has_layout(impl, {blocks_of(c10::multiply_integers(plan_param.sizes))}, {1});
    default:
      return has_layout(impl, plan_param.sizes, plan_param.dense_strides);
  }
}

MemoryRegion StateItem::region(const PlanParam& plan_param) const {
  switch (kind) {
    case Kind::kScalar:
      return MemoryRegion::of(guard.impl, {}, {}, written);
    case Kind::kScales:
      return MemoryRegion::of(guard.impl, guard.impl->sizes(), {1}, written);
    default:
      return MemoryRegion::of(guard.impl, plan_param.sizes, plan_param.dense_strides, written);
  }
}

}  // namespace fusedopt

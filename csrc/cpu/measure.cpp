#include "measure.h"

#include "../dispatch.h"
#include "grad_norm.h"

namespace fusedopt::cpu {

double chunk_norm(const Pass& pass, Isa isa, Chunk chunk) {
  const TensorEntry& tensor = pass.tensors[chunk.tensor];
  double result = 0;
  visit_types(tensor, [&](auto types) {
    using param_t = typename decltype(types)::param_t;
    using grad_t = typename decltype(types)::grad_t;
    const auto* grad = static_cast<const grad_t*>(pass.grads[chunk.tensor]) + chunk.begin();
    const int64_t size = chunk.size(tensor.numel);
    visit_norm(pass.options.norm_type, [&](auto norm) {
      run_best<ChunkNorm<decltype(norm), param_t, grad_t>>(isa, grad, size, &result);
    });
  });
  return result;
}

double total_of_chunks(const Pass& pass) {
  return visit_norm(pass.options.norm_type, [&](auto norm) {
    return total<decltype(norm)>(pass.chunk_sums, pass.num_chunks);
  });
}

}  // namespace fusedopt::cpu

// The kernels for every other processor: plain C++ that the compiler vectorises.
#include <cmath>

#include "kernels.h"

namespace dcnzoo::cpu::portable {
namespace {
#include "simd_generic.h"
// This first.
#include "dcnv4_points.h"
// And then
#include "dcnv4_backward.h"
#include "dcnv4_forward.h"

template <typename V>
using VectorFor = GenericVector<Accumulator<V>, 16 / sizeof(Accumulator<V>)>;
}  // namespace

template <typename V, typename O>
void forward_pixels(const Forward<V, O>& call, int64_t begin, int64_t end) {
  forward<VectorFor<V>>(call, begin, end);
}

template <typename V, typename O>
void backward_units(const Backward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  backward<VectorFor<V>>(call, bands, begin, end);
}

DCNZOO_INSTANTIATE_KERNELS(float, float)
DCNZOO_INSTANTIATE_KERNELS(double, double)
DCNZOO_INSTANTIATE_KERNELS(Half, Half)
DCNZOO_INSTANTIATE_KERNELS(Half, float)
DCNZOO_INSTANTIATE_KERNELS(BFloat16, BFloat16)
DCNZOO_INSTANTIATE_KERNELS(BFloat16, float)

}  // namespace dcnzoo::cpu::portable

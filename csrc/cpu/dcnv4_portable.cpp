// The kernels for every other processor: plain C++ that the compiler vectorises.
#include <cmath>

#include "kernels.h"

namespace dcnzoo::cpu::portable {
namespace {
#include "simd_generic.h"
// This first.
#include "dcnv4_kernels.h"

template <typename V>
using VectorFor = GenericVector<Accumulator<V>, 16 / sizeof(Accumulator<V>)>;
}  // namespace

template <typename V, typename O>
void forward_pixels(const Forward<V, O>& call, int64_t begin, int64_t end) {
  forward<VectorFor<V>>(call, begin, end);
}

#define INSTANTIATE(V, O) template void forward_pixels(const Forward<V, O>&, int64_t, int64_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(Half, Half)
INSTANTIATE(Half, float)
INSTANTIATE(BFloat16, BFloat16)
INSTANTIATE(BFloat16, float)

}  // namespace dcnzoo::cpu::portable

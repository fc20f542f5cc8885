// DCNv4 for every other processor: plain C++ that the compiler vectorises.
#include <cmath>

#include "kernels.h"

namespace dcnzoo::cpu::portable {
namespace {
#include "simd_generic.h"

template <typename V>
using VectorFor = GenericVector<Accumulator<V>, 16 / sizeof(Accumulator<V>)>;
}  // namespace
#include "dcnv4_simd.h"
}  // namespace dcnzoo::cpu::portable

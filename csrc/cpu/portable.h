// Compiles the kernels in the header that DCNZOO_KERNELS names for every processor: plain C++ that the compiler vectorises.
// What they include themselves comes before.
#include <cmath>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 sees some where lanes are written one by one
#endif

namespace dcnzoo::cpu::portable {
namespace {
#include "simd_generic.h"

template <typename V>
using VectorFor = GenericVector<Accumulator<V>, 16 / sizeof(Accumulator<V>)>;
}  // namespace
#include DCNZOO_KERNELS
}  // namespace dcnzoo::cpu::portable

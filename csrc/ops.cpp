// Registers the kernels of one library with the dispatcher. The schemas are defined in dcnzoo/ops/_library.py, so that
// the operators exist where nothing was compiled. This file is built twice: into dcnzoo._cpu and into dcnzoo._cuda.
#include <torch/csrc/stable/library.h>

#include "dcnv4.h"
#include "deform_attn.h"
#ifndef DCNZOO_CUDA
#include "cpu/depthwise.h"
#include "cpu/mixed_kernels.h"
#endif

#ifdef DCNZOO_CUDA
#define DCNZOO_DEVICE CUDA
#define DCNZOO_MODULE PyInit__cuda
#else
#define DCNZOO_DEVICE CPU
#define DCNZOO_MODULE PyInit__cpu
#endif

STABLE_TORCH_LIBRARY_IMPL(dcnzoo, DCNZOO_DEVICE, m) {
  m.impl("dcnv4", TORCH_BOX(&dcnzoo::dcnv4));
  m.impl("dcnv4_backward", TORCH_BOX(&dcnzoo::dcnv4_backward));
  m.impl("deform_attn", TORCH_BOX(&dcnzoo::deform_attn));
  m.impl("deform_attn_backward", TORCH_BOX(&dcnzoo::deform_attn_backward));
#ifndef DCNZOO_CUDA
  m.impl("depthwise", TORCH_BOX(&dcnzoo::depthwise));
  m.impl("depthwise_backward", TORCH_BOX(&dcnzoo::depthwise_backward));
  m.impl("depthwise_planes", TORCH_BOX(&dcnzoo::depthwise_planes));
  m.impl("mixed_kernels", TORCH_BOX(&dcnzoo::mixed_kernels));
#endif
}

// setuptools makes Windows' linker export this of every extension. Nothing calls it: the library is loaded as such, so
// that building it takes no Python headers.
extern "C" void* DCNZOO_MODULE() {
  return nullptr;
}

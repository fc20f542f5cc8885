// Registers the kernels of one library with the dispatcher. The schemas are defined in dcnzoo/ops/_library.py, so that
// the operators exist where nothing was compiled. This file is built twice: into dcnzoo._cpu and into dcnzoo._cuda.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "dcnv4.h"

#ifdef DCNZOO_CUDA
#define DCNZOO_DEVICE CUDA
#define DCNZOO_MODULE PyInit__cuda
#define DCNZOO_MODULE_NAME "_cuda"
#else
#define DCNZOO_DEVICE CPU
#define DCNZOO_MODULE PyInit__cpu
#define DCNZOO_MODULE_NAME "_cpu"
#endif

STABLE_TORCH_LIBRARY_IMPL(dcnzoo, DCNZOO_DEVICE, m) {
  m.impl("dcnv4", TORCH_BOX(&dcnzoo::dcnv4));
  m.impl("dcnv4_backward", TORCH_BOX(&dcnzoo::dcnv4_backward));
}

// An empty module: importing it loads the library on every platform, without a search for its file.
PyMODINIT_FUNC DCNZOO_MODULE(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, DCNZOO_MODULE_NAME, nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

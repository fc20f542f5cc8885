// The CUDA operators as CPU operators of another namespace, run by the emulation.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "../../../csrc/dcnv4.h"
#include "../../../csrc/deform_attn.h"

// The runtime functions that the operators call; there is neither device nor stream here.
extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}
}

#define GEOMETRY                                                                                              \
  "int groups, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, " \
  "int dilation_w, float offset_scale, bool remove_center, bool softmax"

#define ATTENTION "Tensor value, Tensor sampling_locations, Tensor attention_weights, int[] spatial_shapes"

STABLE_TORCH_LIBRARY(dcnzoo_emulated, m) {
  m.def("dcnv4(Tensor value, Tensor offset_mask, " GEOMETRY ") -> Tensor");
  m.def(
      "dcnv4_backward(Tensor grad_output, Tensor value, Tensor offset_mask, " GEOMETRY
      ", bool deterministic) -> (Tensor, Tensor)");
  m.def("deform_attn(" ATTENTION ") -> Tensor");
  m.def("deform_attn_backward(Tensor grad_output, " ATTENTION ", bool deterministic) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dcnzoo_emulated, CPU, m) {
  m.impl("dcnv4", TORCH_BOX(&dcnzoo::dcnv4));
  m.impl("dcnv4_backward", TORCH_BOX(&dcnzoo::dcnv4_backward));
  m.impl("deform_attn", TORCH_BOX(&dcnzoo::deform_attn));
  m.impl("deform_attn_backward", TORCH_BOX(&dcnzoo::deform_attn_backward));
}

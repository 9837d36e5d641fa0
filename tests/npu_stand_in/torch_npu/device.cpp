// A device of PyTorch's PrivateUse1, which torch-npu is too, that computes: memory of its own, the kernels of the CPU.
//
// An operator that meets a tensor of this device and one of the host is refused, as on a card. What the CPU's kernels
// make of the device's tensors is the device's again. Streams have no length: everything is done when a call returns.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/stack.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/TensorShape.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::SymInt;
using c10::SymIntArrayRef;

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kCards = 8;

thread_local c10::DeviceIndex current = 0;  // of every thread the first, as on a card

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* start = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {start, start, &std::free, Device(kNpu, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(kNpu, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kNpu; }
  Device getDevice() const override { return Device(kNpu, current); }
  void setDevice(Device device) const override { current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  Device exchangeDevice(Device device) const override {
    return Device(kNpu, std::exchange(current, device.index()));
  }
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kCards; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  c10::DeviceIndex deviceCount() const override { return kCards; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
};

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kNpu; }

// The same memory, seen from the other side, which keeps it.
Tensor seen_from(Device device, const Tensor& tensor) {
  return at::for_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes())
      .strides(tensor.strides())
      .deleter([held = tensor](void*) {})
      .options(tensor.options().device(device))
      .target_device(device)
      .make_tensor();
}

Tensor as_host(const Tensor& tensor) { return seen_from(c10::kCPU, tensor); }

// The tensors of one call: to the host before the kernel, to the device after it.
struct Crossing {
  std::vector<std::pair<Tensor, Tensor>> pairs;  // host, device
  std::optional<Device> device;
  bool host_tensor = false;  // of one dimension at least: single numbers may stay on the host

  Tensor there(const Tensor& tensor) {
    if (!on_device(tensor)) {
      host_tensor |= tensor.defined() && tensor.dim() > 0;
      return tensor;
    }
    device = tensor.device();
    // an empty one may be where a result goes, and be made larger
    auto host = tensor.numel() ? as_host(tensor) : at::empty(tensor.sizes(), tensor.options().device(c10::kCPU));
    pairs.emplace_back(host, tensor);
    return host;
  }

  Tensor back(const Tensor& tensor) const {
    if (!tensor.defined() || !device) return tensor;
    for (const auto& [host, original] : pairs) {
      if (!host.is_same(tensor)) continue;
      if (original.numel() == 0 && tensor.numel()) {
        original.resize_(tensor.sizes());
        as_host(original).copy_(tensor);
      } else if (original.sizes() != tensor.sizes()) {
        original.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
      }
      return original;
    }
    return seen_from(*device, tensor);
  }
};

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Crossing crossing;
  for (size_t at = stack->size() - op.schema().arguments().size(); at < stack->size(); ++at) {
    auto& value = (*stack)[at];
    if (value.isTensor()) {
      value = crossing.there(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorList().vec()) list.push_back(crossing.there(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList().vec())
        list.push_back(tensor ? std::optional<Tensor>(crossing.there(*tensor)) : std::nullopt);
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == kNpu) {
      crossing.device = value.toDevice();
      value = c10::IValue(Device(c10::kCPU));
    }
  }
  TORCH_CHECK(
      crossing.pairs.empty() || !crossing.host_tensor,
      op.schema().name(), " met tensors of two devices, npu and cpu");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t at = stack->size() - op.schema().returns().size(); at < stack->size(); ++at) {
    auto& value = (*stack)[at];
    if (value.isTensor()) {
      value = crossing.back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorList().vec()) list.push_back(crossing.back(tensor));
      value = list;
    }
  }
}

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(
    SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device && device->has_index() ? *device : Device(kNpu, current));
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device && device->has_index() ? *device : Device(kNpu, current));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory, kKeys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool) {
  (on_device(target) ? as_host(target) : target).copy_(on_device(self) ? as_host(self) : self);
  return target;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}

at::Scalar item(const Tensor& self) { return as_host(self).item(); }

Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& self, SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const Tensor& resize(const Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const size_t bytes = (self.storage_offset() + self.numel()) * self.element_size();
  const auto& storage = self.storage();
  if (bytes > storage.nbytes()) {
    auto larger = memory.allocate(bytes);
    if (storage.nbytes()) std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(larger));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source) { return at::native::set_(self, source); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage", set_storage);
  m.impl("unfold", at::native::unfold);
  m.impl("alias", at::native::alias);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

}  // namespace

PYBIND11_MODULE(device, m) {
  m.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(new Hooks); });
  m.def("as_host", as_host);
  m.def("current_device", [] { return current; });
  m.def("set_device", [](c10::DeviceIndex index) { current = index; });
  m.attr("cards") = static_cast<int>(kCards);
}

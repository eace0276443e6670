// What libtorch asks of a GPU where there is none: a CPU build of torch that is preloaded with this
// runs autograd, autocast and pinned memory over tensors that only say that they are on cuda:0.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device ONLY(CUDA, 0);

struct OneDevice final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return ONLY; }
  c10::Device getDevice() const override { return ONLY; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  // The engine's own events, between its threads' streams, which are one here.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, ONLY); }
};

c10::impl::DeviceGuardImplRegistrar guard(CUDA, new OneDevice);

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

REGISTER_CUDA_HOOKS(CUDAHooks);  // by this name torch looks for them

// A CPU build knows no accelerator, whatever is registered: these stand before its own.
namespace accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return CUDA; }
bool isAccelerator(c10::DeviceType type) { return type == CUDA; }
}  // namespace accelerator

}  // namespace at

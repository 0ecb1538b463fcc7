// The small module that is not an operator: build facts, the instruction set in use, and the laws' counters.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/backend.h"
#if defined(PDDM_CUDA)
#include "../cuda/backend.h"
#endif
#include "threads.h"

namespace py = pybind11;

namespace {

struct DeviceCounters {
  pddm::Counters (*read)();
  void (*reset)();
};

DeviceCounters counters_of(const std::string& device) {
#if defined(PDDM_EMULATED)
  if (device == "cpu") return {pddm::cuda::read_counters, pddm::cuda::reset_counters};
#else
  if (device == "cpu") return {pddm::cpu::read_counters, pddm::cpu::reset_counters};
#if defined(PDDM_CUDA)
  if (device == "cuda") return {pddm::cuda::read_counters, pddm::cuda::reset_counters};
#endif
#endif
  throw py::value_error("device is '" + device + "', which this build has no counters for");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of pddm_ext; importing it registers torch.ops.pddm.";

  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = PDDM_COMPILER;
    info["built_with_torch"] = PDDM_TORCH_VERSION;
    info["stable_abi"] = PDDM_STABLE_ABI;
#if defined(PDDM_CUDA)
    info["cuda"] = PDDM_CUDA;
#else
    info["cuda"] = py::none();
#endif
    return info;
  });
#if defined(PDDM_CUDA)
  m.def(
      "warpgroups", [](int device) { return pddm::cuda::warpgroups(pddm::Precision::bfloat16, device); },
      py::arg("device"), "Whether that CUDA device scores half precisions by Hopper's matrix instructions.");
#endif
  m.def(
      "cpu_capabilities",
      [] {
        py::dict all;
        for (const auto& set : pddm::cpu::capabilities()) all[py::str(set.name)] = set.supported;
        return all;
      },
      "Compiled instruction sets, lowest first, and whether this machine has them.");
  m.def("cpu_capability", &pddm::cpu::capability, "The instruction set in use.");
  m.def("set_cpu_capability", &pddm::cpu::set_capability, py::arg("name"),
        "Use this set from now on; an empty name is the best one. Raises ValueError.");
  m.def(
      "multiplies_bfloat16",
      [] { return pddm::cpu::effective(pddm::Precision::bfloat16) == pddm::Precision::bfloat16; },
      "Whether bfloat16 products run as such; otherwise they run in float32.");
  m.def(
      "multiply_add_peak",
      [](const std::string& dtype, double seconds) {
        const auto precision = dtype == "float64"    ? pddm::Precision::float64
                               : dtype == "bfloat16" ? pddm::Precision::bfloat16
                               : dtype == "float32"  ? pddm::Precision::float32
                                                     : throw py::value_error("dtype is '" + dtype + "'");
        return pddm::cpu::multiply_add_peak(precision, pddm::torch_threads(), seconds);
      },
      py::arg("dtype") = "float32", py::arg("seconds") = 0.05, py::call_guard<py::gil_scoped_release>(),
      "Measured multiply-add ceiling of torch's threads together, in floating-point operations per second.");
  m.def(
      "counters",
      [](const std::string& device) {
        const pddm::Counters c = counters_of(device).read();
        py::dict counters;
        counters["pairs_scored"] = c.pairs_scored;
        counters["bytes_peak"] = c.bytes_peak;
        counters["launches"] = c.launches;
        counters["allocations"] = c.allocations;
        return counters;
      },
      py::arg("device") = "cpu",
      "Since the last reset: pairs scored, the peak of native scratch in bytes, kernels launched and allocations made "
      "(0 on the CPU). Waits for the current CUDA device.");
  m.def("reset_counters", [](const std::string& device) { counters_of(device).reset(); }, py::arg("device") = "cpu");
}

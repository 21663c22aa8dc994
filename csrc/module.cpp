// The pybind11 module: what was built and how, and the host's RNG for its tests. Free of tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "philox.h"

namespace py = pybind11;

PYBIND11_MODULE(_build, m) {
  m.doc() = "How edlm was built, and the host side of its random numbers.";

  m.attr("ABI") = 2;  // python/edlm/ops/_library.py expects the same

  m.def(
      "info",
      [] {
        py::dict info;
        info["compiler"] = EDLM_COMPILER;
        info["cxx_flags"] = EDLM_CXX_FLAGS;
        info["build_type"] = EDLM_BUILD_TYPE;
        info["torch_built_with"] = EDLM_TORCH_VERSION;
        info["torch_target"] = EDLM_TORCH_TARGET;
        info["cuda"] = EDLM_CUDA_MODE;
        std::vector<std::string> compiled;
#if defined(EDLM_HAVE_X86_ISA)
        const int levels = 3;
#else
        const int levels = 1;
#endif
        compiled.reserve(levels);
        for (int i = 0; i < levels; ++i) compiled.push_back(edlm::isa_name(i));
        info["cpu_isa_compiled"] = compiled;
        info["cpu_isa_used"] = edlm::isa_name(edlm::isa_level());
        return info;
      },
      "Versions, flags and instruction sets of the compiled part.");

  m.def(
      "philox4x32",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        const edlm::Words r = edlm::philox4x32({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
        return std::array<uint32_t, 4>{r.x, r.y, r.z, r.w};
      },
      py::arg("counter"), py::arg("key"), "Ten rounds of Philox4x32 on the host.");

  m.def(
      "philox_uniform",
      [](int64_t seed, int64_t position, int64_t candidate, int64_t offset, uint32_t purpose) {
        const edlm::Uniforms u = edlm::philox_uniform(seed, position, candidate, offset, edlm::Purpose{purpose});
        return std::pair{u.first, u.second};
      },
      py::arg("seed"), py::arg("position"), py::arg("candidate"), py::arg("offset"), py::arg("purpose"),
      "The two uniforms of a counter, as the kernels draw them.");
}

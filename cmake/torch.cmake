# The torch of the target environment: its headers and libraries, without find_package(Torch), which wants a CUDA toolkit whenever
# torch has CUDA. Only the stable C ABI is used, so that one build serves later versions too.
#
# `-I` makes Python ignore PYTHONPATH, by which pip isolates a build: the environment that will run edlm is the one that is asked.
execute_process(
  COMMAND ${Python_EXECUTABLE} -I -c [[
import importlib.util, os, runpy, sys
spec = importlib.util.find_spec("torch")
if spec is None or not spec.submodule_search_locations:
    sys.exit(3)
root = list(spec.submodule_search_locations)[0]
version = runpy.run_path(os.path.join(root, "version.py"))
print(root, version["__version__"], version.get("cuda") or "none", sep=";")
]]
  OUTPUT_VARIABLE EDLM_TORCH_FACTS OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE EDLM_TORCH_FOUND ERROR_VARIABLE EDLM_TORCH_ERROR)
if(NOT EDLM_TORCH_FOUND EQUAL 0)
  message(FATAL_ERROR
    "edlm: torch is not installed for ${Python_EXECUTABLE}. Install it first, then edlm: pip install torch==2.13.0 && pip install .")
endif()
list(GET EDLM_TORCH_FACTS 0 EDLM_TORCH_ROOT)
list(GET EDLM_TORCH_FACTS 1 EDLM_TORCH_VERSION)
list(GET EDLM_TORCH_FACTS 2 EDLM_TORCH_CUDA)
if(EDLM_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR
    "edlm: torch >= 2.11 is needed (its stable C ABI), found ${EDLM_TORCH_VERSION}. Upgrade it: pip install torch==2.13.0")
endif()
message(STATUS "edlm: torch ${EDLM_TORCH_VERSION}, CUDA ${EDLM_TORCH_CUDA}")

set(EDLM_TORCH_TARGET "2.11")

function(edlm_link_torch target)
  target_include_directories(${target} SYSTEM PRIVATE ${EDLM_TORCH_ROOT}/include)
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=0x020b000000000000)
  target_link_directories(${target} PRIVATE ${EDLM_TORCH_ROOT}/lib)
  # The Python module has loaded torch by the time this library is, so no rpath is needed.
  target_link_options(${target} PRIVATE -Wl,--no-as-needed)
  target_link_libraries(${target} PRIVATE torch torch_cpu)
endfunction()

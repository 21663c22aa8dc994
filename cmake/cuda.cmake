# The CUDA kernels: _C_cuda, the same bindings as _C's compiled for a GPU, and csrc/cuda. Whether they are built is decided by what is installed
# (nvcc, a torch with CUDA), never by whether a GPU is present.
file(GLOB EDLM_CUDA_KERNELS CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu)
include(CheckLanguage)

if(NOT EDLM_CUDA MATCHES "^(AUTO|ON|OFF|COMPILE)$")
  message(FATAL_ERROR "edlm: EDLM_CUDA: expected AUTO, ON, OFF or COMPILE, got ${EDLM_CUDA}")
endif()

set(EDLM_CUDA_STATUS "off")
set(EDLM_BUILD_CUDA OFF)
if(NOT EDLM_CUDA STREQUAL "OFF")
  check_language(CUDA)
  if(EDLM_CUDA MATCHES "^(ON|COMPILE)$" AND NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "edlm: EDLM_CUDA=${EDLM_CUDA} needs nvcc, and none was found. Put it on PATH, or pass -DEDLM_CUDA=OFF")
  endif()
  if(EDLM_CUDA STREQUAL "ON" AND EDLM_TORCH_CUDA STREQUAL "none")
    message(FATAL_ERROR "edlm: EDLM_CUDA=ON needs a torch with CUDA, found ${EDLM_TORCH_VERSION}. Install one, or pass -DEDLM_CUDA=COMPILE")
  endif()
  if(CMAKE_CUDA_COMPILER)
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE EDLM_NVCC_TEXT ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" EDLM_NVCC_TEXT "${EDLM_NVCC_TEXT}")
    set(EDLM_NVCC_VERSION "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    string(REGEX MATCH "^[0-9]+" EDLM_TORCH_CUDA_MAJOR "${EDLM_TORCH_CUDA}")
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    set(EDLM_CUDA_STATUS "off: no nvcc")
  elseif(EDLM_CUDA STREQUAL "AUTO" AND EDLM_TORCH_CUDA STREQUAL "none")
    set(EDLM_CUDA_STATUS "off: torch has no CUDA")
  elseif(EDLM_NVCC_VERSION VERSION_LESS 12.8)  # C++20, sm_100
    set(EDLM_CUDA_STATUS "off: nvcc ${EDLM_NVCC_VERSION} is older than 12.8")
    if(NOT EDLM_CUDA STREQUAL "AUTO")
      message(FATAL_ERROR "edlm: EDLM_CUDA=${EDLM_CUDA} needs nvcc >= 12.8, found ${EDLM_NVCC_VERSION}. Upgrade the CUDA toolkit, or pass -DEDLM_CUDA=OFF")
    endif()
  elseif(EDLM_CUDA STREQUAL "AUTO" AND EDLM_NVCC_VERSION VERSION_GREATER_EQUAL "${EDLM_TORCH_CUDA_MAJOR}.99")
    # Its runtime may want a newer driver than torch does: every launch would fail.
    set(EDLM_CUDA_STATUS "off: nvcc ${EDLM_NVCC_VERSION} is of a later major version than torch's CUDA ${EDLM_TORCH_CUDA}")
  else()
    set(EDLM_BUILD_CUDA ON)
  endif()
endif()

if(EDLM_BUILD_CUDA)
  # Ampere, Hopper, Blackwell, and PTX for what comes later. -DCMAKE_CUDA_ARCHITECTURES=90 builds for one of them alone, in a third of the time.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 100-virtual)
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # torch brings a runtime of its own, perhaps of another version
  enable_language(CUDA)
  find_path(EDLM_CUDA_INCLUDE nvtx3/nvToolsExt.h HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} REQUIRED)
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " EDLM_CUDA_ARCHITECTURES)
  set(EDLM_CUDA_STATUS "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}, sm ${EDLM_CUDA_ARCHITECTURES}")

  add_library(_C_cuda MODULE ${EDLM_BINDINGS} ${EDLM_CUDA_KERNELS})
  set_target_properties(_C_cuda PROPERTIES PREFIX "" OUTPUT_NAME _C_cuda SUFFIX .so CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON
    CUDA_VISIBILITY_PRESET hidden)
  target_compile_definitions(_C_cuda PRIVATE EDLM_CUDA USE_CUDA)
  target_include_directories(_C_cuda SYSTEM PRIVATE ${EDLM_CUDA_INCLUDE})
  target_compile_options(_C_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:${EDLM_FLAGS}>
    $<$<COMPILE_LANGUAGE:CUDA>:-O3 --threads=0 -Werror=all-warnings>)
  edlm_link_torch(_C_cuda)
  target_link_libraries(_C_cuda PRIVATE ${CMAKE_DL_LIBS})  # NVTX looks for a profiler at run time
  if(EDLM_CUDA STREQUAL "COMPILE")
    set(EDLM_CUDA_STATUS "compiled only: ${EDLM_CUDA_STATUS}")
  else()
    install(TARGETS _C_cuda LIBRARY DESTINATION edlm)
  endif()
endif()
message(STATUS "edlm: CUDA ${EDLM_CUDA_STATUS}")

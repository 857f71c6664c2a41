# Decides whether the CUDA kernels are built. Sets COSIM_WITH_CUDA, COSIM_CUDA_ARCHITECTURES and COSIM_CUDA_REASON, the
# sentence that cosim_native.cuda_info() repeats. The last word has a trial build of the kernels themselves, because a
# compiler may be there and be too old, broken, or at odds with the host compiler.

set(COSIM_WITH_CUDA FALSE)
set(COSIM_CUDA_ARCHITECTURES "")
set(COSIM_CUDA_REASON "")

if(NOT COSIM_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "COSIM_CUDA is '${COSIM_CUDA}'; it can be AUTO, ON or OFF.")
elseif(COSIM_CUDA STREQUAL "OFF")
  set(COSIM_CUDA_REASON "built with COSIM_CUDA=OFF")
else()
  include(CheckLanguage)
  if(NOT DEFINED ENV{CUDACXX} AND NOT DEFINED CMAKE_CUDA_COMPILER)
    find_program(COSIM_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda /opt/cuda PATH_SUFFIXES bin)
    if(COSIM_NVCC)
      set(ENV{CUDACXX} "${COSIM_NVCC}")
    endif()
  endif()
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES OFF) # named per target below
  endif()
  check_language(CUDA) # builds a small program apart, so that a broken compiler ends nothing here
  if(NOT CMAKE_CUDA_COMPILER)
    set(COSIM_CUDA_REASON "no working CUDA compiler was found at build time")
  else()
    enable_language(CUDA)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE gpu_code ERROR_QUIET)
    foreach(architecture IN ITEMS 80 90 100) # A100, H100, B200
      if(gpu_code MATCHES "sm_${architecture}[^0-9a-z]")
        list(APPEND COSIM_CUDA_ARCHITECTURES "${architecture}-real")
        set(newest "${architecture}-virtual")
      endif()
    endforeach()
    list(APPEND COSIM_CUDA_ARCHITECTURES ${newest}) # as PTX, for what comes after
    if(COSIM_CUDA_ARCHITECTURES)
      list(GET COSIM_CUDA_ARCHITECTURES 0 oldest)
      try_compile(COSIM_CUDA_BUILDS "${CMAKE_CURRENT_BINARY_DIR}/cuda_trial"
        SOURCES "${CMAKE_CURRENT_SOURCE_DIR}/kernels/gemm.cu" "${CMAKE_CURRENT_SOURCE_DIR}/kernels/cuda_trial.cpp"
        CMAKE_FLAGS "-DCMAKE_CUDA_ARCHITECTURES=${oldest}" "-DINCLUDE_DIRECTORIES=${CMAKE_CURRENT_SOURCE_DIR}"
        COMPILE_DEFINITIONS -DCOSIM_WITH_CUDA=1
        OUTPUT_VARIABLE trial CUDA_STANDARD 17 CXX_STANDARD 17)
    endif()
    if(COSIM_CUDA_BUILDS)
      set(COSIM_WITH_CUDA TRUE)
      set(COSIM_CUDA_REASON "built with CUDA ${CMAKE_CUDA_COMPILER_VERSION}")
    else()
      set(COSIM_CUDA_REASON "the CUDA ${CMAKE_CUDA_COMPILER_VERSION} compiler found at build time could not build the kernels")
      message(VERBOSE "${trial}")
    endif()
  endif()
  if(COSIM_CUDA STREQUAL "ON" AND NOT COSIM_WITH_CUDA)
    message(FATAL_ERROR "COSIM_CUDA=ON, but ${COSIM_CUDA_REASON}. Name a compiler in CUDACXX, or use COSIM_CUDA=AUTO.")
  endif()
endif()
message(STATUS "cosim_native: CUDA kernels ${COSIM_WITH_CUDA} (${COSIM_CUDA_REASON}) ${COSIM_CUDA_ARCHITECTURES}")

// The Python module cosim_native._core: checks what it is given, releases the interpreter lock, calls the kernels.
//
// Arrays come through DLPack or the buffer protocol, so NumPy arrays and PyTorch tensors are used where they lie.
// Nothing is copied or converted: an array of another type or layout is refused.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>

#include "engine/binding.h"
#include "kernels/kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Input = nb::ndarray<nb::ro>;
using Output = nb::ndarray<>;

// The array that a Python object gives access to, without a copy.
template <typename Array>
Array array_from(nb::handle object, const char* name) {
    Array array;
    if (!nb::try_cast<Array>(object, array, false)) {
        const std::string type = nb::type_name(object.type()).c_str();
        const bool written = std::is_same_v<Array, Output>;
        throw nb::type_error((std::string(name) + " must be a " + (written ? "writable " : "") +
                              "NumPy array or PyTorch tensor with memory on a CPU or a CUDA device, not " + type).c_str());
    }
    return array;
}

std::string shape_of(const nb::ndarray<nb::ro>& array) {
    std::string text = "(";
    for (std::size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
    return text + ")";
}

bool is_dense_row_major(const nb::ndarray<nb::ro>& array) {
    if (array.size() == 0) return true;
    std::int64_t expected = 1;
    for (std::size_t i = array.ndim(); i-- > 0;) {
        if (array.shape(i) != 1 && array.stride(i) != expected) return false;
        expected *= static_cast<std::int64_t>(array.shape(i));
    }
    return true;
}

// Refuses what a kernel cannot take: fp32, `dims` dimensions, row-major without gaps, on a CPU or a CUDA device.
void check(const nb::ndarray<nb::ro>& array, const std::string& name, std::size_t dims) {
    if (array.dtype() != nb::dtype<float>())
        throw nb::type_error((name + " must be float32 (it is not converted, so that nothing is copied unseen)").c_str());
    if (array.ndim() != dims)
        throw nb::value_error((name + " must have " + std::to_string(dims) + " dimension" + (dims == 1 ? "" : "s") +
                               ", its shape is " + shape_of(array)).c_str());
    if (!is_dense_row_major(array))
        throw nb::value_error((name + " must be contiguous, rows one after the other: make it so with "
                               "numpy.ascontiguousarray(x) or x.contiguous()").c_str());
    if (array.device_type() != nb::device::cpu::value && array.device_type() != nb::device::cuda::value)
        throw nb::value_error((name + " must be on a CPU or a CUDA device").c_str());
}

const float* data(const Input& array) { return static_cast<const float*>(array.data()); }
float* data(const Output& array) { return static_cast<float*>(array.data()); }

// Refuses arrays on different devices, and an output that shares memory with an input.
void check_together(const nb::ndarray<nb::ro>& input, const std::string& name, const Output& out) {
    if (input.device_type() != out.device_type() || input.device_id() != out.device_id())
        throw nb::value_error((name + " and out must be on the same device").c_str());
    const float *in_first = data(input), *out_first = data(out);
    if (input.size() && out.size() && in_first < out_first + out.size() && out_first < in_first + input.size())
        throw nb::value_error(("out must not share memory with " + name).c_str());
}

unsigned thread_count(int threads) {
    if (threads < 0) throw nb::value_error("threads must be 0 (one per processor) or more");
    return threads > 0 ? static_cast<unsigned>(threads) : std::max(1u, std::thread::hardware_concurrency());
}

void gemm(nb::handle given_a, nb::handle given_b, nb::handle given_out, int threads, std::uintptr_t stream,
          const std::string& instructions) {
    const auto a = array_from<Input>(given_a, "a"), b = array_from<Input>(given_b, "b");
    const auto out = array_from<Output>(given_out, "out");
    check(a, "a", 2);
    check(b, "b", 2);
    check(Input(out), "out", 2);
    const std::size_t m = a.shape(0), k = a.shape(1), n = b.shape(1);
    if (b.shape(0) != k || out.shape(0) != m || out.shape(1) != n)
        throw nb::value_error(("shapes do not fit: a " + shape_of(a) + ", b " + shape_of(b) + ", out " + shape_of(Input(out)) +
                               "; wanted (m, k), (k, n), (m, n)").c_str());
    check_together(a, "a", out);
    check_together(b, "b", out);
    const unsigned count = thread_count(threads);
    if (out.device_type() == nb::device::cuda::value) {
#if COSIM_WITH_CUDA
        std::string failure;
        {
            nb::gil_scoped_release release;
            failure = cosim::gemm_cuda(data(a), data(b), data(out), m, n, k, out.device_id(), stream);
        }
        if (!failure.empty()) throw std::runtime_error("gemm on CUDA device " + std::to_string(out.device_id()) + ": " + failure);
        return;
#else
        throw std::runtime_error("gemm: the arrays are on a CUDA device, but there are no CUDA kernels: " COSIM_CUDA_REASON);
#endif
    }
    nb::gil_scoped_release release;
    cosim::gemm_cpu(data(a), data(b), data(out), m, n, k, count, instructions);
}

Output output_vector(nb::handle given) {
    const auto out = array_from<Output>(given, "out");
    check(Input(out), "out", 1);
    if (out.device_type() != nb::device::cpu::value) throw nb::value_error("out must be on the CPU");
    return out;
}

Input input_vector(nb::handle given, const char* name, const Output& out) {
    const auto input = array_from<Input>(given, name);
    check(input, name, 1);
    if (input.size() != out.size())
        throw nb::value_error((std::string(name) + " has " + std::to_string(input.size()) + " elements and out has " +
                               std::to_string(out.size())).c_str());
    check_together(input, name, out);
    return input;
}

void stream_copy(nb::handle given_a, nb::handle given_out, int threads) {
    const Output out = output_vector(given_out);
    const Input a = input_vector(given_a, "a", out);
    const unsigned count = thread_count(threads);
    nb::gil_scoped_release release;
    cosim::stream_copy_cpu(data(a), data(out), out.size(), count);
}

void stream_triad(nb::handle given_b, nb::handle given_c, float scalar, nb::handle given_out, int threads) {
    const Output out = output_vector(given_out);
    const Input b = input_vector(given_b, "b", out), c = input_vector(given_c, "c", out);
    const unsigned count = thread_count(threads);
    nb::gil_scoped_release release;
    cosim::stream_triad_cpu(data(b), data(c), scalar, data(out), out.size(), count);
}

std::tuple<bool, int, std::string> cuda_info() {
#if COSIM_WITH_CUDA
    std::string why_none;
    const int devices = cosim::cuda_devices(why_none);
    return {true, devices, std::string(COSIM_CUDA_REASON) + (why_none.empty() ? "" : "; " + why_none)};
#else
    return {false, 0, "no CUDA kernels: " COSIM_CUDA_REASON};
#endif
}

}  // namespace

NB_MODULE(_core, m) {
    m.def("gemm", &gemm, "a"_a, "b"_a, "out"_a, "threads"_a, "stream"_a, "instructions"_a);
    m.def("stream_copy", &stream_copy, "a"_a, "out"_a, "threads"_a);
    m.def("stream_triad", &stream_triad, "b"_a, "c"_a, "scalar"_a, "out"_a, "threads"_a);
    m.def("cuda_info", &cuda_info);
    m.def("cpu_instructions", &cosim::gemm_cpu_instructions);
    cosim::engine::bind(m);
}

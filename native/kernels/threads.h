// Runs one function on several threads at once, the caller's among them, and waits for all.
#pragma once

#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace cosim {

// `work` takes no argument and shares out what there is to do itself. The first exception it throws is thrown on here.
template <typename Work>
void run_on_threads(unsigned threads, const Work& work) {
    std::exception_ptr failure;
    std::mutex guard;
    const auto caught = [&] {
        try {
            work();
        } catch (...) {
            const std::lock_guard<std::mutex> lock(guard);
            failure = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    for (unsigned i = 1; i < threads; ++i) {
        try {
            others.emplace_back(caught);
        } catch (const std::system_error&) {
            break;  // the system grants no more threads; those that run do all the work
        }
    }
    caught();
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace cosim

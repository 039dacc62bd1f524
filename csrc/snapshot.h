// Whether Python objects are what they were: what a call of fused layers takes for granted, read
// from C++ because there are thousands of values to look at.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace mnv2 {

// What is seen of some objects: the class of each of `objects`; of each of `dicts` its keys and
// values, by identity and in order; and of these values the items of lists, and the memory, layout
// and version of tensors. Identities mean something while their objects are alive, which is the
// caller's task: nothing is held here, so that garbage collection need not know of it.
class Snapshot {
 public:
    // Nothing where that would not say enough: a tensor without memory of its own, a list in a
    // list.
    static std::optional<Snapshot> take(const pybind11::list& objects, const pybind11::list& dicts);

    // Whether a snapshot of the same objects would be equal.
    bool matches(const pybind11::list& objects, const pybind11::list& dicts) const;

 private:
    std::vector<uint64_t> words_;
    // What `matches` is going to read, in that order, and how much of it for each dict.
    std::vector<const void*> lines_;
    std::vector<uint32_t> lines_of_dicts_;
};

}  // namespace mnv2

// Whether Python objects are what they were: what a call of fused layers takes for granted, read
// from C++ because there are thousands of values to look at.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace mnv2 {

// What is seen of some objects: the class and the `__dict__` of each; of each of their dicts the
// keys and values, by identity and in order; and of these values the items of lists, and the
// memory, layout and version of tensors. Nothing is held here, so that garbage collection need not
// know of it: identities mean something while `Taken::alive` is.
class Snapshot {
 public:
    struct Taken;

    // Of every object's `__dict__`, and of the dicts that it has under `names`. Nothing where that
    // would not say enough: where one is no plain dict (an empty one of another kind will do),
    // where tensors have no memory of their own, or sequences are too long or too deep.
    static std::optional<Taken> take(const pybind11::list& objects, const pybind11::list& names);

    // Whether a snapshot of the same objects would be equal; `dicts` are those that were taken.
    bool matches(const pybind11::list& objects, const pybind11::list& dicts) const;

 private:
    std::vector<uint64_t> words_;
    // What `matches` is going to read, in that order, and how much of it for each dict.
    std::vector<const void*> lines_;
    std::vector<uint32_t> lines_of_dicts_;
};

struct Snapshot::Taken {
    Snapshot snapshot;
    pybind11::list dicts;
    pybind11::list alive;  // all whose identity was seen
};

}  // namespace mnv2

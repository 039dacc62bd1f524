// Whether Python modules are what they were. Every call of fused layers asks this, of thousands of
// values, so it is asked from C++.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "tensor_facts.h"

namespace mnv2 {

enum class Change { same, weights, structure };

// What one look has seen of a dict.
struct DictLook {
    uint64_t version;  // 0: unknown
    // Where the dict ends in `words` and `inside` of the look, and how many of `lines` are its own.
    uint32_t words_end, inside_end, lines;
};

// A value that may change while it stays the same object, and where its word is: a tensor, or a
// sequence with a list inside.
struct Inside {
    PyObject* value;
    uint32_t word;
};

// Everything that one look has seen.
struct Look {
    std::vector<uint64_t> words;
    std::vector<DictLook> dicts;
    std::vector<Inside> inside;
    std::vector<TensorFacts> tensors;
    // Of each tensor, where its elements are whose bits are compared: bytes after the first one.
    std::vector<uint32_t> samples_of_tensors;
    std::vector<int64_t> samples;
    // No other storage gets the address of one of these; their memory is not kept.
    std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages;
    // What the next look is going to read, in that order.
    std::vector<const void*> lines;
};

// What is seen of some objects: the class and the `__dict__` of each; of each of their dicts the
// keys and values, by identity and in order; of these values the items of lists, and the facts of
// tensors. CPython up to 3.12 counts the versions of dicts: of a dict whose version is the same,
// only the values that may change are looked at. No Python object is held here, so that garbage
// collection need not know of it: identities mean something while all in the list `alive` are.
class Guard {
 public:
    struct Taken;

    // Of every object's `__dict__`, and of the dicts that it has under `names`. Nothing where that
    // would not say enough: where one is no dict whose order is known, where tensors have no
    // memory of their own, or sequences are too long or too deep.
    static std::optional<Taken> take(const pybind11::list& objects, const pybind11::list& names);

    // What has changed of the same objects. After `weights`, what is there now counts as known, and
    // `alive` has what it needs. `dicts` are those that were taken.
    Change check(const pybind11::list& objects, const pybind11::list& dicts,
                 const pybind11::list& alive);

    // Of any tensor, at the last look.
    bool requires_grad() const;

    // How often `check` has answered `weights`: counted together with what is known, so that a
    // caller that hears `same` finds the count of what is known.
    uint64_t changes() const { return changes_; }

 private:
    Look known_;
    uint64_t changes_ = 0;
};

struct Guard::Taken {
    Guard guard;
    pybind11::list dicts;
    pybind11::list alive;  // all whose identity was seen
};

}  // namespace mnv2

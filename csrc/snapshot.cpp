#include "snapshot.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace mnv2 {
namespace {

using Word = uint64_t;

constexpr size_t kLine = 64;
// Dicts whose memory is asked for before it is read: it comes from L3 where layers ran in between.
constexpr size_t kAhead = 24;

Word word(const void* address) { return reinterpret_cast<Word>(address); }

// What is looked at behind a value, in the low bits of its address.
enum Kind : Word { kPlain, kTensor, kList, kKindBits = 3 };

// A tuple of lists or a list of lists: items that may change while all that is seen stays.
bool holds_a_list(PyObject* sequence) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
    PyObject** items = PySequence_Fast_ITEMS(sequence);
    return std::any_of(items, items + count, [](PyObject* item) {
        return PyList_Check(item) || (PyTuple_CheckExact(item) && holds_a_list(item));
    });
}

// Two ways to walk over the same objects. Both answer false to end the walk.
struct Recorder {
    std::vector<Word> words;
    std::vector<const void*> lines;

    bool see(Word word) {
        words.push_back(word);
        return true;
    }

    std::optional<Kind> see_value(PyObject* value) {
        if ((PyList_Check(value) || PyTuple_CheckExact(value)) && holds_a_list(value)) return {};
        const Kind kind = THPVariable_Check(value) ? kTensor : PyList_Check(value) ? kList : kPlain;
        see(word(value) | kind);
        return kind;
    }

    void will_read(const void* first, size_t bytes) {
        const char* begin = static_cast<const char*>(first);
        for (size_t at = 0; at < bytes; at += kLine) lines.push_back(begin + at);
        lines.push_back(begin + bytes - 1);
    }
};

struct Comparer {
    const Word* at;
    const Word* end;

    bool see(Word word) { return at != end && *at++ == word; }

    std::optional<Kind> see_value(PyObject* value) {
        if (at == end || (*at & ~kKindBits) != word(value)) return {};
        return static_cast<Kind>(*at++ & kKindBits);
    }

    void will_read(const void*, size_t) {}
};

template <class Walk>
bool see_tensor(PyObject* object, Walk& walk) {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    walk.will_read(&tensor, sizeof tensor);
    walk.will_read(impl, sizeof *impl);
    if (!impl->has_storage() || impl->has_symbolic_sizes_strides() ||
        impl->layout() != at::kStrided)
        return false;
    const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
    walk.will_read(storage, sizeof *storage);
    if (storage->data() == nullptr) return false;
    // Inference tensors count no versions.
    const Word version = impl->is_inference() ? 0 : impl->version_counter().current_version();
    bool same = walk.see(word(impl)) && walk.see(word(storage->data())) &&
                walk.see(storage->nbytes()) && walk.see(impl->storage_offset()) &&
                walk.see(version) && walk.see(static_cast<Word>(impl->dtype().toScalarType())) &&
                walk.see(impl->requires_grad()) && walk.see(impl->dim());
    for (int64_t i = 0; same && i < impl->dim(); i++)
        same = walk.see(impl->sizes()[i]) && walk.see(impl->strides()[i]);
    return same;
}

template <class Walk>
bool see_items(PyObject* list, Walk& walk) {
    const Py_ssize_t count = PyList_GET_SIZE(list);
    bool same = walk.see(count);
    for (Py_ssize_t i = 0; same && i < count; i++) same = walk.see(word(PyList_GET_ITEM(list, i)));
    return same;
}

template <class Walk>
bool see_dict(PyObject* dict, Walk& walk) {
    if (!PyDict_Check(dict)) return false;
    const Py_ssize_t count = PyDict_GET_SIZE(dict);
    walk.will_read(dict, sizeof(PyDictObject));
    // Subclasses may order their items anew.
    if (!walk.see(count) || (count > 0 && !PyDict_CheckExact(dict))) return false;
    if (count > 0) {
        // Values are beside the keys, or in an array of their own where objects share keys.
        const auto* table = reinterpret_cast<PyDictObject*>(dict);
        if (table->ma_values != nullptr)
            walk.will_read(table->ma_values, count * sizeof(PyObject*));
        else
            walk.will_read(table->ma_keys, kLine + count * 2 * sizeof(PyObject*));
    }
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(dict, &position, &key, &value)) {
        if (!walk.see(word(key))) return false;
        const std::optional<Kind> kind = walk.see_value(value);
        if (!kind || (*kind == kTensor && !see_tensor(value, walk)) ||
            (*kind == kList && !see_items(value, walk)))
            return false;
    }
    return true;
}

template <class Walk>
bool see_classes(const pybind11::list& objects, Walk& walk) {
    return std::all_of(objects.begin(), objects.end(), [&](pybind11::handle object) {
        return walk.see(word(Py_TYPE(object.ptr())));
    });
}

}  // namespace

std::optional<Snapshot> Snapshot::take(const pybind11::list& objects, const pybind11::list& dicts) {
    Recorder recorder;
    Snapshot taken;
    if (!see_classes(objects, recorder)) return {};
    for (const auto& dict : dicts) {
        const size_t before = recorder.lines.size();
        if (!see_dict(dict.ptr(), recorder)) return {};
        taken.lines_of_dicts_.push_back(recorder.lines.size() - before);
    }
    taken.words_ = std::move(recorder.words);
    taken.lines_ = std::move(recorder.lines);
    return taken;
}

bool Snapshot::matches(const pybind11::list& objects, const pybind11::list& dicts) const {
    Comparer comparer{words_.data(), words_.data() + words_.size()};
    if (dicts.size() != lines_of_dicts_.size()) return false;
    const void* const* line = lines_.data();
    size_t asked_for = 0;
    const auto ask_for_next = [&] {
        if (asked_for == lines_of_dicts_.size()) return;
        for (uint32_t i = 0; i < lines_of_dicts_[asked_for]; i++) __builtin_prefetch(*line++);
        asked_for++;
    };
    while (asked_for < std::min(kAhead, lines_of_dicts_.size())) ask_for_next();
    if (!see_classes(objects, comparer)) return false;
    for (const auto& dict : dicts) {
        ask_for_next();
        if (!see_dict(dict.ptr(), comparer)) return false;
    }
    return comparer.at == comparer.end;
}

}  // namespace mnv2

#include "snapshot.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace mnv2 {
namespace {

using Word = uint64_t;

constexpr size_t kLine = 64;
// Dicts whose memory is asked for before it is read: it comes from L3 where layers ran in between.
constexpr size_t kAhead = 24;
// Sequences in sequences; a list may have itself inside.
constexpr int kDeepest = 8;
// Items of one that are still cheap to look at.
constexpr Py_ssize_t kLongest = 1000;

Word word(const void* address) { return reinterpret_cast<Word>(address); }

// What is looked at behind a value, in the low bits of its address.
enum Kind : Word { kPlain, kTensor, kSequence, kKindBits = 3 };

// Items that may change while the sequence stays: of a list, of a tuple that has one inside.
bool has_a_list(PyObject* value, int depth = 0) {
    if (!PyTuple_Check(value) || depth == kDeepest) return PyList_Check(value) || depth == kDeepest;
    PyObject** items = PySequence_Fast_ITEMS(value);
    return std::any_of(items, items + PyTuple_GET_SIZE(value),
                       [depth](PyObject* item) { return has_a_list(item, depth + 1); });
}

// By its real class: what an object says of its class may run Python, and need not be true.
bool is_tensor(PyObject* value) {
    return PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// Two ways to walk over the same objects. Both answer false to end the walk. Neither runs Python,
// which could change what is walked over.
struct Recorder {
    std::vector<Word> words;
    std::vector<const void*> lines;
    std::vector<pybind11::object> alive;

    bool see(Word word) {
        words.push_back(word);
        return true;
    }

    bool see_object(PyObject* object) {
        alive.push_back(pybind11::reinterpret_borrow<pybind11::object>(object));
        return see(word(object));
    }

    std::optional<Kind> see_value(PyObject* value) {
        const Kind kind = is_tensor(value) ? kTensor : has_a_list(value) ? kSequence : kPlain;
        see_object(value);
        words.back() |= kind;
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

    bool see_object(PyObject* object) { return see(word(object)); }

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
    if (!impl->has_storage() || impl->has_symbolic_sizes_strides() || tensor.is_nested() ||
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
bool see_value(PyObject* value, Walk& walk, int depth = 0) {
    const std::optional<Kind> kind = walk.see_value(value);
    if (!kind) return false;
    if (*kind == kTensor) return see_tensor(value, walk);
    if (*kind == kPlain) return true;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
    if (depth == kDeepest || count > kLongest || !walk.see(count)) return false;
    PyObject** items = PySequence_Fast_ITEMS(value);
    return std::all_of(items, items + count,
                       [&](PyObject* item) { return see_value(item, walk, depth + 1); });
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
        if (!walk.see_object(key)) return false;
        if (!see_value(value, walk)) return false;
    }
    return true;
}

// Its `__dict__`; nothing where it has none.
pybind11::object dict_of(pybind11::handle object) {
    PyObject* const dict = PyObject_GenericGetDict(object.ptr(), nullptr);
    if (dict == nullptr) PyErr_Clear();
    return pybind11::reinterpret_steal<pybind11::object>(dict);
}

template <class Walk>
bool see_classes_and_dicts(const pybind11::list& objects, Walk& walk) {
    for (const pybind11::handle object : objects) {
        const pybind11::object dict = dict_of(object);
        auto* const kind = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
        if (!dict || !walk.see_object(kind) || !walk.see_object(dict.ptr())) return false;
    }
    return true;
}

}  // namespace

std::optional<Snapshot::Taken> Snapshot::take(const pybind11::list& objects,
                                              const pybind11::list& names) {
    Taken taken;
    for (const pybind11::handle object : objects) {
        const pybind11::object own = dict_of(object);
        if (!own || !PyDict_Check(own.ptr())) return {};
        taken.dicts.append(own);
        for (const pybind11::handle name : names) {
            PyObject* const inside = PyDict_GetItem(own.ptr(), name.ptr());
            if (inside == nullptr) return {};
            taken.dicts.append(pybind11::handle(inside));
        }
    }
    Recorder recorder;
    Snapshot& snapshot = taken.snapshot;
    if (!see_classes_and_dicts(objects, recorder)) return {};
    for (const pybind11::handle dict : taken.dicts) {
        const size_t before = recorder.lines.size();
        if (!see_dict(dict.ptr(), recorder)) return {};
        snapshot.lines_of_dicts_.push_back(recorder.lines.size() - before);
    }
    snapshot.words_ = std::move(recorder.words);
    snapshot.lines_ = std::move(recorder.lines);
    for (const pybind11::object& object : recorder.alive) taken.alive.append(object);
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
    if (!see_classes_and_dicts(objects, comparer)) return false;
    for (const pybind11::handle dict : dicts) {
        ask_for_next();
        if (!see_dict(dict.ptr(), comparer)) return false;
    }
    return comparer.at == comparer.end;
}

}  // namespace mnv2

#include "guard.h"

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

// Whenever keys or values of a dict change, CPython gives it a number that no dict has had. 0
// stands for an OrderedDict, whose order may change without that.
#if PY_VERSION_HEX < 0x030D0000
constexpr bool kHasVersions = true;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
Word version_of(PyObject* dict) {
    const auto* known = reinterpret_cast<PyDictObject*>(dict);
    return PyDict_CheckExact(dict) ? known->ma_version_tag : 0;
}
#pragma GCC diagnostic pop
#else
constexpr bool kHasVersions = false;
Word version_of(PyObject*) { return 0; }
#endif

Word word(const void* address) { return reinterpret_cast<Word>(address); }

// What follows a value and is looked at, in the low bits of its address; of its class's for
// tensors.
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

PyObject* class_of(PyObject* value) { return reinterpret_cast<PyObject*>(Py_TYPE(value)); }

// Allocating a Python object may start a garbage collection, which runs Python.
class NoCollection {
 public:
    NoCollection() : was_enabled_(PyGC_Disable()) {}
    ~NoCollection() {
        if (was_enabled_) PyGC_Enable();
    }
    NoCollection(const NoCollection&) = delete;
    NoCollection& operator=(const NoCollection&) = delete;

 private:
    int was_enabled_;
};

// Two ways to walk over the same objects. All answer false to end the walk. Neither runs Python,
// which could change what is walked over.
struct Recorder {
    Look look;
    std::vector<PyObject*> alive;

    bool see(Word word) {
        look.words.push_back(word);
        return true;
    }

    bool see_object(PyObject* object) {
        alive.push_back(object);
        return see(word(object));
    }

    std::optional<Kind> see_value(PyObject* value) {
        alive.push_back(value);
        if (is_tensor(value)) {
            see_object(class_of(value));
            look.words.back() |= kTensor;
            return kTensor;
        }
        const Kind kind = has_a_list(value) ? kSequence : kPlain;
        see(word(value) | kind);
        return kind;
    }

    void may_change(PyObject* value) {
        look.inside.push_back({value, static_cast<uint32_t>(look.words.size() - 1)});
    }

    bool see_facts(PyObject* object, c10::TensorImpl& impl) {
        const size_t before = look.samples.size();
        if (impl.device().is_cpu()) append_samples(impl, look.samples);
        const uint32_t count = look.samples.size() - before;
        const auto facts = facts_of(object, impl, look.samples.data() + before, count);
        if (!facts) return false;
        for (uint32_t i = 0; i < count; i++) will_read(facts->data + look.samples[before + i], 1);
        look.samples_of_tensors.push_back(count);
        look.tensors.push_back(*facts);
        look.storages.push_back(impl.storage().getWeakStorageImpl());
        return true;
    }

    void will_read(const void* first, size_t bytes) {
        const char* begin = static_cast<const char*>(first);
        const char* end = begin + bytes - 1;
        for (const char* at = begin; word(at) / kLine <= word(end) / kLine; at += kLine)
            will_read_line(at);
    }

    void will_read_line(const void* at) {
        const bool known =
            !look.lines.empty() && word(look.lines.back()) / kLine == word(at) / kLine;
        if (!known) look.lines.push_back(at);
    }
};

struct Comparer {
    const Look& look;
    const Word* at;
    const Word* end;
    const Inside* inside;
    const TensorFacts* tensor;
    const uint32_t* samples_of_tensor;
    const int64_t* samples;
    bool facts_differ = false;

    explicit Comparer(const Look& known)
        : look(known),
          at(look.words.data()),
          end(at + look.words.size()),
          inside(look.inside.data()),
          tensor(look.tensors.data()),
          samples_of_tensor(look.samples_of_tensors.data()),
          samples(look.samples.data()) {}

    bool see(Word word) { return at != end && *at++ == word; }

    bool see_object(PyObject* object) { return see(word(object)); }

    std::optional<Kind> see_value(PyObject* value) {
        if (at == end) return {};
        const Kind kind = static_cast<Kind>(*at & kKindBits);
        // A tensor's class: a tensor.
        if ((*at & ~Word{kKindBits}) != word(kind == kTensor ? class_of(value) : value)) return {};
        at++;
        return kind;
    }

    bool see_facts(PyObject* object, c10::TensorImpl& impl) {
        const uint32_t count = *samples_of_tensor++;
        const auto facts = facts_of(object, impl, samples, count);
        if (!facts) return false;
        samples += count;
        if (*facts != *tensor++) facts_differ = true;
        return true;
    }

    void may_change(PyObject*) { inside++; }
    void will_read(const void*, size_t) {}
};

template <class Walk>
bool see_tensor(PyObject* object, Walk& walk) {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (!tensor.defined()) return false;
    c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    walk.will_read(&tensor, sizeof tensor);
    walk.will_read(&impl, sizeof impl);
    if (!can_be_seen(impl)) return false;
    walk.will_read(impl.unsafe_storage().unsafeGetStorageImpl(), sizeof(c10::StorageImpl));
    if (impl.autograd_meta() != nullptr)
        walk.will_read(impl.autograd_meta(), sizeof(torch::autograd::AutogradMeta));
    const c10::Device device = impl.device();
    bool same =
        walk.see(impl.key_set().raw_repr()) &&
        walk.see(static_cast<Word>(device.type()) << 8 | static_cast<uint8_t>(device.index())) &&
        walk.see(static_cast<Word>(impl.dtype().toScalarType())) && walk.see(impl.dim());
    for (int64_t i = 0; same && i < impl.dim(); i++)
        same = walk.see(impl.sizes()[i]) && walk.see(impl.strides()[i]);
    return same && walk.see_facts(object, impl);
}

template <class Walk>
bool see_value(PyObject* value, Walk& walk, int depth = 0) {
    const std::optional<Kind> kind = walk.see_value(value);
    if (!kind) return false;
    if (*kind == kPlain) return true;
    if (depth == 0) walk.may_change(value);
    if (*kind == kTensor) return see_tensor(value, walk);
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
    if (depth == kDeepest || count > kLongest || !walk.see(count)) return false;
    PyObject** items = PySequence_Fast_ITEMS(value);
    return std::all_of(items, items + count,
                       [&](PyObject* item) { return see_value(item, walk, depth + 1); });
}

// Whether the values of an unchanged dict that may change are what they were.
bool see_inside(const DictLook& dict, Comparer& walk) {
    const Inside* const end = walk.look.inside.data() + dict.inside_end;
    while (walk.inside != end) {
        walk.at = walk.look.words.data() + walk.inside->word;
        if (!see_value(walk.inside->value, walk)) return false;
    }
    walk.at = walk.look.words.data() + dict.words_end;
    return true;
}

// An OrderedDict has an order of its own besides the order of the dict that it is.
template <class Walk>
bool see_ordered_items(PyObject* dict, Walk& walk) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    // Keys of other classes may run Python when they are looked up.
    while (PyDict_Next(dict, &position, &key, &value))
        if (!PyUnicode_CheckExact(key) && !PyLong_CheckExact(key)) return false;
    const NoCollection no_collection;
    const auto keys = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetIter(dict));
    bool same = static_cast<bool>(keys);
    while (same && (key = PyIter_Next(keys.ptr())) != nullptr) {
        value = PyDict_GetItemWithError(dict, key);
        same = value != nullptr && walk.see_object(key) && see_value(value, walk);
        Py_DECREF(key);
    }
    same = same && PyErr_Occurred() == nullptr;
    PyErr_Clear();
    return same;
}

// Values are next to the keys, or in an array of their own where objects share keys.
template <class Walk>
void will_read_items(PyObject* dict, Py_ssize_t count, Walk& walk) {
    const auto* table = reinterpret_cast<PyDictObject*>(dict);
    if (table->ma_values != nullptr)
        walk.will_read(table->ma_values, count * sizeof(PyObject*));
    else
        walk.will_read(table->ma_keys, kLine + count * 2 * sizeof(PyObject*));
}

template <class Walk>
bool see_dict(PyObject* dict, Walk& walk) {
    if (!PyDict_Check(dict)) return false;
    const Py_ssize_t count = PyDict_GET_SIZE(dict);
    if (!walk.see(count)) return false;
    if (count == 0) return true;
    if (PyODict_CheckExact(dict)) return see_ordered_items(dict, walk);
    // Other subclasses may order their items anew.
    if (!PyDict_CheckExact(dict)) return false;
    if (!kHasVersions) will_read_items(dict, count, walk);
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
        if (!dict || !walk.see_object(class_of(object.ptr())) || !walk.see_object(dict.ptr()))
            return false;
    }
    return true;
}

bool record(const pybind11::list& objects, const pybind11::list& dicts, Recorder& recorder) {
    if (!see_classes_and_dicts(objects, recorder)) return false;
    Look& look = recorder.look;
    for (const pybind11::handle dict : dicts) {
        const size_t before = look.lines.size();
        recorder.will_read(dict.ptr(), sizeof(PyDictObject));
        if (!see_dict(dict.ptr(), recorder)) return false;
        look.dicts.push_back({version_of(dict.ptr()), static_cast<uint32_t>(look.words.size()),
                              static_cast<uint32_t>(look.inside.size()),
                              static_cast<uint32_t>(look.lines.size() - before)});
    }
    return true;
}

pybind11::list list_of(const std::vector<PyObject*>& objects) {
    pybind11::list list(objects.size());
    for (size_t i = 0; i < objects.size(); i++)
        PyList_SET_ITEM(list.ptr(), i, Py_NewRef(objects[i]));
    return list;
}

}  // namespace

std::optional<Guard::Taken> Guard::take(const pybind11::list& objects,
                                        const pybind11::list& names) {
    const NoCollection no_collection;
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
    if (!record(objects, taken.dicts, recorder)) return {};
    taken.alive = list_of(recorder.alive);
    taken.guard.known_ = std::move(recorder.look);
    return taken;
}

Change Guard::check(const pybind11::list& objects, const pybind11::list& dicts,
                    const pybind11::list& alive) {
    if (dicts.size() != known_.dicts.size()) return Change::structure;
    Comparer comparer(known_);
    const void* const* line = known_.lines.data();
    auto asked_for = known_.dicts.begin();
    const auto ask_for_next = [&] {
        if (asked_for == known_.dicts.end()) return;
        for (uint32_t i = 0; i < asked_for->lines; i++) __builtin_prefetch(*line++);
        asked_for++;
    };
    for (size_t i = 0; i < kAhead; i++) ask_for_next();
    if (!see_classes_and_dicts(objects, comparer)) return Change::structure;
    auto known = known_.dicts.begin();
    for (const pybind11::handle handle : dicts) {
        ask_for_next();
        PyObject* const dict = handle.ptr();
        const Word version = version_of(dict);
        const bool same = version != 0 && version == known->version ? see_inside(*known, comparer)
                                                                    : see_dict(dict, comparer);
        if (!same) return Change::structure;
        known++->version = version;
    }
    if (comparer.at != comparer.end) return Change::structure;
    if (!comparer.facts_differ) return Change::same;
    pybind11::list needed;
    {
        // Nothing runs between the looks: what is recorded now differs in facts at most.
        const NoCollection no_collection;
        Recorder recorder;
        if (!record(objects, dicts, recorder)) return Change::structure;
        needed = list_of(recorder.alive);
        known_ = std::move(recorder.look);
        changes_++;
    }
    // Last, since what is let go of here may run Python, and ask this guard again.
    if (PyList_SetSlice(alive.ptr(), 0, PyList_GET_SIZE(alive.ptr()), needed.ptr()) != 0)
        throw pybind11::error_already_set();
    return Change::weights;
}

bool Guard::requires_grad() const {
    return std::any_of(known_.tensors.begin(), known_.tensors.end(),
                       [](const TensorFacts& facts) { return facts.requires_grad; });
}

}  // namespace mnv2

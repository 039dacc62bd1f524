// What changes of a tensor while it stays one of the same class, shape, strides, dtype and device.
#pragma once
#include <c10/core/TensorImpl.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace mnv2 {

struct TensorFacts {
    const void* object;
    const void* storage;
    const char* data;
    uint64_t storage_bytes;
    uint64_t version;
    uint64_t bits;  // of a few elements
    bool requires_grad;

    bool operator==(const TensorFacts& other) const;
    bool operator!=(const TensorFacts& other) const { return !(*this == other); }
};

// Whether changes of the tensor are counted, or can be compared.
bool can_be_seen(const c10::TensorImpl& impl);

// Appends the places of a few elements, from the first to the last in memory: bytes after the
// first. Elements that share memory count as one.
void append_samples(const c10::TensorImpl& impl, std::vector<int64_t>& samples);

// Of the tensor whose Python object this is. Nothing where there is less memory than its shape
// says.
std::optional<TensorFacts> facts_of(const void* object, c10::TensorImpl& impl,
                                    const int64_t* samples, uint32_t count);

}  // namespace mnv2

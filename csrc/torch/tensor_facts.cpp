#include "tensor_facts.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace mnv2 {
namespace {

using Word = uint64_t;

// Elements of a tensor whose bits are compared.
constexpr int64_t kSamples = 8;

// Tensors that stand for others, or whose values do not follow from their memory alone.
constexpr c10::DispatchKeySet kForeign{
    c10::DispatchKey::Python,           c10::DispatchKey::Functionalize,
    c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
    c10::DispatchKey::Quantized,        c10::DispatchKey::NestedTensor};

// Differs wherever the bits of one element do; for several, it is a hash.
template <class Element>
Word bits_of(const char* data, const int64_t* samples, uint32_t count) {
    Word bits = count;
    for (uint32_t i = 0; i < count; i++) {
        std::array<Word, (sizeof(Element) + 7) / 8> words{};
        std::memcpy(words.data(), data + samples[i], sizeof(Element));
        for (const Word word : words) {
            bits = (bits ^ word) * 0x9E3779B97F4A7C15;
            bits ^= bits >> 32;
        }
    }
    return bits;
}

Word bits_of(size_t bytes, const char* data, const int64_t* samples, uint32_t count) {
    switch (bytes) {
        case 1:
            return bits_of<uint8_t>(data, samples, count);
        case 2:
            return bits_of<uint16_t>(data, samples, count);
        case 4:
            return bits_of<uint32_t>(data, samples, count);
        case 8:
            return bits_of<uint64_t>(data, samples, count);
        default:
            return bits_of<std::array<uint64_t, 2>>(data, samples, count);
    }
}

}  // namespace

bool TensorFacts::operator==(const TensorFacts& other) const {
    return object == other.object && storage == other.storage && data == other.data &&
           storage_bytes == other.storage_bytes && version == other.version && bits == other.bits &&
           requires_grad == other.requires_grad;
}

bool can_be_seen(const c10::TensorImpl& impl) {
    return impl.has_storage() && !impl.has_symbolic_sizes_strides() &&
           impl.layout() == c10::kStrided && !impl.key_set().has_any(kForeign);
}

void append_samples(const c10::TensorImpl& impl, std::vector<int64_t>& samples) {
    const auto extent = [&](int64_t i) { return impl.strides()[i] == 0 ? 1 : impl.sizes()[i]; };
    int64_t count = impl.numel() == 0 ? 0 : 1;
    for (int64_t i = 0; count > 0 && i < impl.dim(); i++) count *= extent(i);
    const int64_t gaps = std::min(count, kSamples) - 1;
    for (int64_t k = 0; k <= gaps; k++) {
        // count - 1 times k / gaps, which would overflow.
        const int64_t last = count - 1;
        int64_t index = gaps == 0 ? 0 : last / gaps * k + last % gaps * k / gaps;
        int64_t offset = 0;
        for (int64_t i = impl.dim() - 1; i >= 0; i--) {
            offset += index % extent(i) * impl.strides()[i];
            index /= extent(i);
        }
        samples.push_back(offset * static_cast<int64_t>(impl.itemsize()));
    }
}

std::optional<TensorFacts> facts_of(const void* object, c10::TensorImpl& impl,
                                    const int64_t* samples, uint32_t count) {
    c10::StorageImpl* storage = impl.unsafe_storage().unsafeGetStorageImpl();
    TensorFacts facts{};
    facts.object = object;
    facts.storage = storage;
    facts.storage_bytes = storage->nbytes();
    const auto* memory = static_cast<const char*>(storage->_mutable_data_ptr_no_checks().get());
    const size_t itemsize = impl.itemsize();
    const size_t before = impl.storage_offset() * itemsize;
    if (memory == nullptr && impl.numel() > 0 && !impl.device().is_meta()) return {};
    if (memory != nullptr) facts.data = memory + before;
    if (count > 0) {
        // The last sample is the last element in memory.
        if (before + samples[count - 1] + itemsize > facts.storage_bytes) return {};
        facts.bits = bits_of(itemsize, facts.data, samples, count);
    }
    // Inference tensors count no versions.
    facts.version = impl.is_inference() ? 0 : impl.version_counter().current_version();
    facts.requires_grad = impl.requires_grad();
    return facts;
}

}  // namespace mnv2

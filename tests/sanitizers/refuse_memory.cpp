// Preloaded into a process: refuses one of the allocations that a test asks to be refused.
#include <malloc.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>

namespace {

enum Kind : int { kNew = 0, kTensor = 1 };

struct Order {
    std::atomic<bool> given{false};
    Kind kind;
    uintptr_t begin, end;  // code whose `new` counts
    std::atomic<int64_t> ahead;
    std::atomic<int> refused;
    std::thread::id by;
} order;

bool is_refused(Kind kind, uintptr_t caller) {
    if (!order.given || order.kind != kind) return false;
    if (kind == kNew && (caller < order.begin || caller >= order.end)) return false;
    if (order.ahead-- != 0) return false;
    order.refused = order.by == std::this_thread::get_id() ? 1 : 2;
    return true;
}

}  // namespace

// From now on: refuse the allocation that `ahead` others of its kind precede. kind 0: those of C++
// by code in [begin, end); kind 1: memory of tensors.
extern "C" void refuse(int kind, int64_t ahead, uintptr_t begin, uintptr_t end) {
    order.kind = static_cast<Kind>(kind), order.begin = begin, order.end = end;
    order.ahead = ahead, order.refused = 0, order.by = std::this_thread::get_id();
    order.given = true;
}

// Refuse nothing more. 0: nothing was; 1: the thread that has asked was refused, 2: another one.
extern "C" int refused() {
    order.given = false;
    return order.refused;
}

void* operator new(size_t size) {
    if (is_refused(kNew, reinterpret_cast<uintptr_t>(__builtin_return_address(0))))
        throw std::bad_alloc();
    if (void* const block = std::malloc(size > 0 ? size : 1)) return block;
    throw std::bad_alloc();
}

extern "C" int posix_memalign(void** block, size_t alignment, size_t size) noexcept {
    if (is_refused(kTensor, 0)) return ENOMEM;
    *block = memalign(alignment, size);
    return *block == nullptr ? ENOMEM : 0;
}

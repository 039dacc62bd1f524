// AddressSanitizer does not see what masked instructions touch. Included ahead of every source, so
// that it is shown their lanes first.
#pragma once
#if defined(__SANITIZE_ADDRESS__) && defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

// Reads the first and the last byte of every lane of kSize bytes that is in the mask.
template <int kSize>
inline void touch_lanes(const void* memory, uint32_t mask) {
    const auto* bytes = static_cast<const volatile char*>(memory);
    for (; mask != 0; mask >>= 1, bytes += kSize)
        if (mask & 1) (void)bytes[0], (void)bytes[kSize - 1];
}

#define MASK_OF_SIGNS(mask) _mm256_movemask_ps(_mm256_castsi256_ps(mask))
#define _mm512_maskz_loadu_ps(mask, p) (touch_lanes<4>(p, mask), (_mm512_maskz_loadu_ps)(mask, p))
#define _mm512_mask_storeu_ps(p, mask, v) \
    (touch_lanes<4>(p, mask), (_mm512_mask_storeu_ps)(p, mask, v))
#define _mm256_maskload_ps(p, mask) \
    (touch_lanes<4>(p, MASK_OF_SIGNS(mask)), (_mm256_maskload_ps)(p, mask))
#define _mm256_maskstore_ps(p, mask, v) \
    (touch_lanes<4>(p, MASK_OF_SIGNS(mask)), (_mm256_maskstore_ps)(p, mask, v))
#define _mm256_maskz_loadu_epi16(mask, p) \
    (touch_lanes<2>(p, mask), (_mm256_maskz_loadu_epi16)(mask, p))
#define _mm256_mask_storeu_epi16(p, mask, v) \
    (touch_lanes<2>(p, mask), (_mm256_mask_storeu_epi16)(p, mask, v))
#endif
